"""The Lightning callback against training loops written by hand, bit for bit."""

from __future__ import annotations

import atexit
import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import ways
from balancing import (
    ACTING,
    CONSTANT,
    IN_FORWARD,
    MAKERS,
    TWO_GRADIENTS,
    Make,
    acted,
    needed,
)
from balancing import make as make_method
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from networks import AudioVisual, batch
from torch import Tensor, nn

import mmfuse
from mmfuse import NoiseStream, amp
from mmfuse.adapters.lightning import Balance, Epochs

pytestmark = [
    pytest.mark.slow_except_for("OGM", "OPM"),
    # Advice of Lightning's about data loaders and logging, which these runs are too small for.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning's own calls.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]

ENCODERS = {"audio": "net.audio_net", "visual": "net.visual_net"}
EPOCHS, STEPS = 4, 3
# How the method is told more than logits and labels, by a test that sets it.
WAY: str | None = None
Data = tuple[Tensor, ...]


class Batches:
    """The same batches in every epoch; an interrupted pass can be gone on with."""

    def __init__(self, count: int = STEPS) -> None:
        self.batches = [batch() for _ in range(count)]
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Data]:
        first, self.next = self.next, 0
        for i in range(first, len(self.batches)):
            self.next = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def forward(net: AudioVisual, data: Data) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and all that a method may want to know."""
    audio, visual, labels = data
    a, v, out = net(audio, visual)
    features = {"audio": a, "visual": v}
    seen = {
        "logits": mmfuse.unimodal_logits(net.fc, features),
        "labels": labels,
        "features": features,
        "inputs": {"audio": audio, "visual": visual},
        "way": WAY,
    }
    return nn.functional.cross_entropy(out, labels), seen


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Module(LightningModule):
    """An audio-visual network that tells the callback what its method wants to know."""

    def __init__(
        self,
        net: AudioVisual,
        balance: Balance,
        make_optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    ) -> None:
        super().__init__()
        self.net = net
        self.balance = balance
        self.make_optimizer = make_optimizer
        self.results: list[Any] = []

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        loss, seen = forward(self.net, data)
        # A callback that the Trainer does not know has None for a method.
        method = self.balance.method
        if method is None:
            seen.pop("way")
        self.balance.observe(**(seen if method is None else needed(method, seen)))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.results.append(self.balance.result)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class Sharing(Module):
    """Validation shares the code of training."""

    def validation_step(self, data: Data, batch_idx: int) -> None:
        Module.training_step(self, data, batch_idx)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**settings, **options})


def fit(
    folder: Path, net: AudioVisual, data: Any, balance: Balance, *others: Callback, **options: Any
) -> Module:
    module = Module(net, balance, options.pop("make_optimizer", sgd))
    ckpt_path = options.pop("ckpt_path", None)
    trainer(folder, balance, *others, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def by_hand(
    net: AudioVisual,
    data: Any,
    make: Make,
    *,
    epochs: int = EPOCHS,
    make_optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    accumulate: int = 1,
    after: Callable[[], None] = lambda: None,
    autocast: torch.dtype | None = None,
) -> Any:
    """Trains `net` with the method that `make` makes; `after` runs before the optimizer's step."""
    method = make(net.encoders)
    optimizer = make_optimizer(net.parameters())
    if method.apply_to == "update":
        method.attach(optimizer)
    for epoch in range(epochs):
        method.set_epoch(epoch)
        for i, each in enumerate(data.batches):
            if i % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
                loss, seen = forward(net, each)
                method.observe(**needed(method, seen))
            (loss / accumulate).backward()
            if i % accumulate == accumulate - 1:
                method.step()
                after()
                optimizer.step()
    return method


def assert_same(a: Any, b: Any, at: str = "") -> None:
    """Nested states are equal, bit for bit."""
    if isinstance(a, Tensor):
        assert torch.equal(torch.nan_to_num(a, 12.5), torch.nan_to_num(b, 12.5)), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{i}]")
    else:
        assert a == b, at


def assert_same_training(module: Module, net: AudioVisual, method: Any) -> None:
    assert_same(dict(module.net.state_dict()), dict(net.state_dict()))
    assert_same(module.balance.method.state_dict(), method.state_dict())


# So that each method's numbers depend on the epoch.
CHANGES: dict[str, dict[str, Any]] = {
    "OGM": {"starts": 1, "ends": 2},
    "RedReg": {"epochs": EPOCHS, "agreement": (-1.0, -0.9)},
}


def balance_for(name: str, **options: Any) -> Balance:
    return Balance(MAKERS[name], ENCODERS, **{**CHANGES.get(name, {}), **options})


def maker(name: str) -> Make:
    return lambda encoders: MAKERS[name](encoders, **CHANGES.get(name, {}))


@pytest.mark.parametrize("name", MAKERS)
def test_training_is_that_of_a_loop_by_hand(tmp_path: Path, name: str) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    module = fit(tmp_path, net, data, balance_for(name))
    method = by_hand(expected, data, maker(name))
    assert len(module.results) == EPOCHS * STEPS
    assert acted(method, module.results)
    assert_same_training(module, expected, method)


@pytest.mark.slow
@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_more_than_logits_and_labels_is_passed_on(
    tmp_path: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data, told = AudioVisual(), Batches(), ways.options(way)
    expected, plain = copy.deepcopy(net), copy.deepcopy(net)
    by_hand(plain, data, maker(name))
    monkeypatch.setattr(sys.modules[__name__], "WAY", way)
    module = fit(tmp_path, net, data, balance_for(name, **told))
    changes = {**CHANGES.get(name, {}), **told}
    method = by_hand(expected, data, lambda encoders: MAKERS[name](encoders, **changes))
    assert acted(method, module.results)
    assert_same_training(module, expected, method)
    weight = net.audio_net.conv1.weight  # of one's own scores InfoReg takes other means alone
    alike = torch.equal(weight, plain.audio_net.conv1.weight)
    assert way == "scores" or name in CONSTANT or not alike


def test_a_factory_makes_the_method(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)

    def make(encoders: Any) -> mmfuse.OGM:
        return mmfuse.OGM.official(encoders, noise=False)

    callback = Balance(make, ENCODERS)
    assert repr(callback).endswith("make)")
    module = fit(tmp_path, net, data, callback)
    assert_same_training(module, expected, by_hand(expected, data, make))
    assert repr(callback).startswith("Balance(OGM(OGMRule(")


@pytest.mark.parametrize("name", MAKERS)
def test_accumulated_gradients_are_modulated_once(tmp_path: Path, name: str) -> None:
    net, data = AudioVisual(), Batches(4)
    expected = copy.deepcopy(net)
    module = fit(tmp_path, net, data, balance_for(name), accumulate_grad_batches=2)
    method = by_hand(expected, data, maker(name), accumulate=2)
    assert len(module.results) == EPOCHS * 2
    assert_same_training(module, expected, method)


def test_clipping_comes_after_modulation(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    module = fit(tmp_path, net, data, balance_for("OGM"), gradient_clip_val=0.05)

    def clip() -> None:
        nn.utils.clip_grad_norm_(expected.parameters(), 0.05)

    method = by_hand(expected, data, maker("OGM"), after=clip)
    assert acted(method, module.results)
    assert_same_training(module, expected, method)


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16(tmp_path: Path, name: str) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    module = fit(tmp_path, net, data, balance_for(name), precision="bf16-mixed")
    method = by_hand(expected, data, maker(name), autocast=torch.bfloat16)
    assert_same_training(module, expected, method)


@pytest.mark.parametrize("fused", [False, True], ids=["unscaled", "fused"])
@pytest.mark.parametrize("name", MAKERS)
def test_grad_scaler(tmp_path: Path, name: str, fused: bool) -> None:
    """The first scale overflows float16, so that steps are skipped."""
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)

    def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, fused=fused)

    def make_scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)

    plugin = MixedPrecision("16-mixed", "cpu", make_scaler())
    options = {"plugins": [plugin], "make_optimizer": make_optimizer}
    module = fit(tmp_path, net, data, balance_for(name), **options)

    method, scaler = maker(name)(expected.encoders), make_scaler()
    optimizer = make_optimizer(expected.parameters())
    skipped = 0
    for epoch in range(EPOCHS):
        method.set_epoch(epoch)
        for each in data.batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss, seen = forward(expected, each)
                method.observe(**needed(method, seen))
            scaler.scale(loss).backward()
            if fused:
                method.step(grad_scale=amp.grad_scale(scaler, "cpu"))
            else:
                scaler.unscale_(optimizer)
                method.step(found_inf=amp.found_inf(scaler, optimizer))
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
    assert 0 < skipped < EPOCHS * STEPS
    assert_same_training(module, expected, method)
    assert plugin.scaler.get_scale() == scaler.get_scale()


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def test_updates_of_the_attached_optimizer_are_scaled(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)

    def make(encoders: Any) -> mmfuse.OGM:
        return mmfuse.OGM(encoders, apply_to="update", stream=NoiseStream(3))

    module = fit(tmp_path, net, data, Balance(make, ENCODERS), make_optimizer=adam)
    method = by_hand(expected, data, make, make_optimizer=adam)
    assert acted(method, module.results)
    assert method.stream.state[1] == EPOCHS * STEPS
    assert_same_training(module, expected, method)


SAVED = {
    "epoch-end": ({}, STEPS),
    "validation-end": ({"save_on_train_epoch_end": False}, STEPS),
    "within": ({"every_n_train_steps": STEPS + 1}, STEPS + 1),
    "last-batch": ({"every_n_train_steps": 2 * STEPS}, 2 * STEPS),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path: Path, name: str, saved: str) -> None:
    options, at = SAVED[saved]
    net, data = AudioVisual(), Batches()
    fresh = copy.deepcopy(net)

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **options)

    def run(net: AudioVisual, path: Path | None = None) -> Module:
        balance = balance_for(name)
        module = Sharing(net, balance)
        batches = Batches()
        batches.batches = data.batches
        trainer(tmp_path, balance, saving()).fit(module, batches, Batches(1), ckpt_path=path)
        return module

    whole = run(net)
    for parameter in fresh.parameters():  # all must come from the checkpoint
        nn.init.zeros_(parameter)
    resumed = run(fresh, tmp_path / f"step={at}.ckpt")
    assert len(resumed.results) == EPOCHS * STEPS - at
    assert_same_training(resumed, whole.net, whole.balance.method)
    for a, b in zip(resumed.results, whole.results[at:], strict=True):
        assert_same(vars(a), vars(b))


def counted(method: Any) -> tuple[int, list[int]]:
    """Epochs, and each modality's steps in this one."""
    return int(method._state["epochs"]), method._state["steps"].tolist()


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    """One Trainer fits again, with more epochs: the method and its state are kept."""
    net, data = AudioVisual(), Batches()
    balance = balance_for("InfoReg")
    module = Module(net, balance)
    runs = trainer(tmp_path, balance, max_epochs=2)
    runs.fit(module, data)
    method = balance.method
    assert method.epoch == 1
    runs.fit_loop.max_epochs = EPOCHS
    runs.fit(module, data)
    assert balance.method is method
    assert len(module.results) == EPOCHS * STEPS
    assert method.epoch == EPOCHS - 1
    assert counted(method) == (EPOCHS - 1, [STEPS, STEPS])
    other = Module(AudioVisual(), balance)
    trainer(tmp_path, balance, max_epochs=1).fit(other, data)
    assert balance.method is not method
    assert counted(balance.method) == (0, [STEPS, STEPS])


def test_a_second_fit_of_the_same_epoch_takes_new_anchors(tmp_path: Path) -> None:
    """Both Trainers count from 0; the parameters have moved on."""
    balance = balance_for("InfoReg")
    module = Module(AudioVisual(), balance)
    for _ in range(2):
        before = [p.detach().clone() for p in module.net.encoders["audio"].parameters()]
        trainer(tmp_path, balance, max_epochs=1).fit(module, Batches())
        assert balance.method.epoch == 0
        pairs = zip(balance.method.anchors.tensors, before, strict=False)
        assert all(torch.equal(anchor, parameter) for anchor, parameter in pairs)
    assert counted(balance.method) == (1, [STEPS, STEPS])


class Copying(Callback):
    """Copies the module in the middle of a fit, as averages of weights do."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *args: Any) -> None:
        self.copied = copy.deepcopy(pl_module)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["during", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_module_with_its_callback_can_be_copied(tmp_path: Path, name: str, how: str) -> None:
    data, copying = Batches(), Copying()
    logger = CSVLogger(tmp_path)
    balance = Balance(mmfuse.METHODS[name], ENCODERS, log_every=1, **ACTING.get(name, {}))
    module = fit(tmp_path, AudioVisual(), data, balance, copying, max_epochs=2, logger=logger)
    if how == "during":
        other = copying.copied
    elif how == "torch.save":
        torch.save(module, tmp_path / "module.pt")
        other = torch.load(tmp_path / "module.pt", weights_only=False)
    else:
        other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    for each in (module, other):
        each.results = []
        trainer(tmp_path, each.balance, max_epochs=2).fit(each, data)
    mine = {id(p) for p in other.parameters()}
    assert all(id(p) in mine for p in other.balance.method.modalities.parameters)
    assert_same_training(module, other.net, other.balance.method)


@pytest.mark.slow
def test_a_second_fit_in_a_spawned_process(tmp_path: Path) -> None:
    """The method that the first has made is pickled on the way there."""
    data = Batches()
    module = fit(tmp_path, AudioVisual(), data, Balance(mmfuse.OGM, ENCODERS), max_epochs=1)
    other = copy.deepcopy(module)
    trainer(tmp_path, other.balance, max_epochs=1).fit(other, data)
    options = {"max_epochs": 1, "strategy": "ddp_spawn"}
    trainer(tmp_path, module.balance, **options).fit(module, data)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


class Tuned(Module):
    """A module with the values that the finders of Lightning's Tuner change."""

    lr = 0.05
    batch_size = 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        rows = [tuple(part[0] for part in batch()) for _ in range(8)]
        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)


def find_rate(tuner: Tuner, module: Tuned) -> None:
    assert tuner.lr_find(module, num_training=4, update_attr=False, early_stop_threshold=None)


def find_size(tuner: Tuner, module: Tuned) -> None:
    assert tuner.scale_batch_size(module, mode="power", max_trials=1, steps_per_trial=1)
    module.batch_size = 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Your `IterableDataset` has `__len__`")
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("find", [find_rate, find_size])
@pytest.mark.parametrize("name", MAKERS)
def test_the_tuner_is_left_alone(
    tmp_path: Path, name: str, find: Callable[..., None], fitted: bool
) -> None:
    """The Tuner fits without callbacks; the training after it is the one without it."""
    options = {"max_epochs": 1, "log_every_n_steps": 1}
    trained = []
    for tune in (True, False):
        torch.manual_seed(0)
        balance = Balance(MAKERS[name], ENCODERS)
        module = Tuned(AudioVisual(), balance)
        if fitted:
            trainer(tmp_path, balance, **options).fit(module)
        if tune:
            before = None if balance.method is None else copy.deepcopy(balance.method.state_dict())
            with torch.random.fork_rng():
                find(Tuner(trainer(tmp_path, balance, **options)), module)
            if before is not None:
                assert_same(balance.method.state_dict(), before)
        module.results.clear()
        torch.manual_seed(1)
        trainer(tmp_path, balance, **options).fit(module)
        assert module.results and module.results[0] is not None
        trained.append(module)
    assert_same_training(trained[0], trained[1].net, trained[1].balance.method)


class Manual(Module):
    """Two optimizers, each with parameters of its own."""

    def __init__(self, net: AudioVisual, balance: Balance, split: bool) -> None:
        super().__init__(net, balance)
        self.automatic_optimization = False
        self.split = split

    def training_step(self, data: Data, batch_idx: int) -> None:
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        loss, seen = forward(self.net, data)
        self.balance.observe(seen["logits"], seen["labels"])
        self.manual_backward(loss)
        for optimizer in both:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        audio = list(self.net.audio_net.parameters())
        visual = list(self.net.visual_net.parameters())
        head = list(self.net.fc.parameters())
        if self.split:
            return [sgd(audio + head), sgd(visual)], []
        return [sgd(head), sgd(audio + visual)], []


@pytest.mark.parametrize("split", [False, True], ids=["head-apart", "encoders-apart"])
def test_several_optimizers(tmp_path: Path, split: bool) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    balance = balance_for("OGM")
    module = Manual(net, balance, split)
    trainer(tmp_path, balance).fit(module, data)
    method = by_hand(expected, data, maker("OGM"))
    # The first optimizer's step is that of the head alone, or of audio and head.
    assert (module.results[0] is None) == (not split)
    assert_same_training(module, expected, method)


class Clipping(Manual):
    """Clips by hand, each optimizer's gradients for themselves."""

    def training_step(self, data: Data, batch_idx: int) -> None:
        both = self.optimizers()
        loss, seen = forward(self.net, data)
        self.balance.observe(seen["logits"], seen["labels"])
        self.manual_backward(loss)
        self.balance.modulate()
        for optimizer in both:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def test_clipping_by_hand_comes_after_modulation(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    balance = balance_for("OGM")
    module = Clipping(net, balance, True)

    def clip() -> None:
        audio = [*expected.audio_net.parameters(), *expected.fc.parameters()]
        for parameters in (audio, list(expected.visual_net.parameters())):
            nn.utils.clip_grad_norm_(parameters, 0.1)

    trainer(tmp_path, balance).fit(module, data)
    assert_same_training(module, expected, by_hand(expected, data, maker("OGM"), after=clip))
    with pytest.raises(RuntimeError, match=r"Balance.modulate belongs in training_step, after"):
        balance.modulate()


class Toggling(Manual):
    """A backward pass for each optimizer, but one observation."""

    def training_step(self, data: Data, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss, seen = forward(self.net, data)
            if i == 0:
                self.balance.observe(seen["logits"], seen["labels"])
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_gradients_that_are_newer_than_the_step(tmp_path: Path) -> None:
    balance = balance_for("OGM")
    with pytest.raises(RuntimeError, match=r"gradients of the encoder of 'visual' are newer than"):
        trainer(tmp_path, balance).fit(Toggling(AudioVisual(), balance, True), Batches())


class Thawing(Module):
    """Its encoders are trained from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        encoders = nn.ModuleDict(self.net.encoders).requires_grad_(self.current_epoch > 0)
        if self.current_epoch == 1:
            self.optimizers().optimizer.add_param_group({"params": list(encoders.parameters())})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net.fc.parameters())


def test_frozen_encoders_are_not_observed(tmp_path: Path) -> None:
    """Else the first step would be of all batches before it."""
    balance = balance_for("OGM", starts=0, ends=None)
    module = Thawing(AudioVisual(), balance)
    trainer(tmp_path, balance, max_epochs=2).fit(module, Batches())
    assert module.results[:STEPS] == [None] * STEPS
    assert balance.method.stream.state[1] == STEPS


def test_several_optimizers_with_encoders_and_a_scaler_are_refused(tmp_path: Path) -> None:
    balance = balance_for("InfoReg")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"InfoReg with a GradScaler .* one optimizer, found 2"):
        trainer(tmp_path, balance, plugins=[plugin]).fit(
            Manual(AudioVisual(), balance, True), Batches()
        )


def test_encoders_that_no_optimizer_holds(tmp_path: Path) -> None:
    def elsewhere(parameters: Any) -> torch.optim.Optimizer:
        return sgd(nn.Linear(1, 1).parameters())

    with pytest.raises(ValueError, match="no optimizer holds a parameter of the encoders"):
        fit(tmp_path, AudioVisual(), Batches(), balance_for("OGM"), make_optimizer=elsewhere)


def test_unknown_encoders(tmp_path: Path) -> None:
    balance = Balance(mmfuse.OGM, {"audio": "net.audio_nt", "visual": "net.visual_net"})
    with pytest.raises(ValueError, match=r"'net.audio_nt' is no .* did you mean 'net.audio_net'"):
        fit(tmp_path, AudioVisual(), Batches(), balance)


class Forgetful(Module):
    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        return forward(self.net, data)[0]


def test_a_training_step_without_observe(tmp_path: Path) -> None:
    balance = balance_for("OGM")
    with pytest.raises(
        RuntimeError, match=r"training_step of Forgetful has not called Balance.obs"
    ):
        trainer(tmp_path, balance).fit(Forgetful(AudioVisual(), balance), Batches())


def test_a_callback_that_the_trainer_does_not_know(tmp_path: Path) -> None:
    module = Module(AudioVisual(), balance_for("OGM"))
    with pytest.raises(RuntimeError, match=r"no fit has been started with this callback"):
        trainer(tmp_path).fit(module, Batches())


class Skipping(Module):
    """Leaves out the second of three batches, after it has been observed."""

    def training_step(self, data: Data, batch_idx: int) -> Tensor | None:
        loss = super().training_step(data, batch_idx)
        return None if batch_idx == 1 else loss


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("accumulate", [1, STEPS])
def test_a_batch_that_is_left_out_counts_in_no_step(tmp_path: Path, accumulate: int) -> None:
    """Its logits have been shown to the method already, but its gradients do not exist."""
    balance = balance_for("OGM", starts=0, ends=None)
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    module = Skipping(net, balance)
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, balance, **options).fit(module, data)
    if accumulate == 1:
        first, left_out, last = module.results
        assert left_out is first is not last
    method = MAKERS["OGM"](expected.encoders, starts=0, ends=None)
    optimizer = sgd(expected.parameters())
    for i in range(STEPS):
        loss, seen = forward(expected, data.batches[i])
        if i == 1:
            continue
        method.observe(seen["logits"], seen["labels"])
        (loss / accumulate).backward()
        if i == 2 or accumulate == 1:
            method.step()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(net.state_dict()), dict(expected.state_dict()))
    assert_same(balance.method.stream.state, method.stream.state)


def test_validation_is_not_taken_in(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    expected = copy.deepcopy(net)
    balance = balance_for("OGM")
    module = Sharing(net, balance)
    runs = trainer(tmp_path, balance)
    runs.fit(module, data, Batches())
    runs.validate(module, Batches(), verbose=False)
    assert_same_training(module, expected, by_hand(expected, data, maker("OGM")))


class Evaluating(Sharing):
    """Its validation records gradients, for an input's saliency."""

    def validation_step(self, data: Data, batch_idx: int) -> None:
        with torch.enable_grad():
            super().validation_step(data, batch_idx)


def test_an_evaluation_with_gradients_is_not_taken_in(tmp_path: Path) -> None:
    balance = balance_for("OGM")
    module = Evaluating(AudioVisual(), balance)
    runs = trainer(tmp_path, balance, inference_mode=False)
    runs.validate(module, Batches(), verbose=False)
    runs.fit(module, Batches(), Batches())
    runs.validate(module, Batches(), verbose=False)
    assert not balance.method._senses.pending


def test_a_checkpoint_that_is_evaluated_does_not_put_the_method_back(tmp_path: Path) -> None:
    net, balance = AudioVisual(), balance_for("OGM", starts=0, ends=None)
    module, path = Sharing(net, balance), tmp_path / "early.ckpt"
    runs = trainer(tmp_path, balance, max_epochs=1)
    runs.fit(module, Batches(), Batches())
    runs.save_checkpoint(path)
    runs = trainer(tmp_path, balance, max_epochs=2)
    runs.fit(module, Batches(), Batches())
    before = copy.deepcopy(balance.state_dict())
    trainer(tmp_path, balance).validate(module, Batches(), ckpt_path=path, verbose=False)
    assert_same(balance.state_dict(), before)
    steps = int(balance.method.stream.state[1])
    trainer(tmp_path, balance, max_epochs=1).fit(module, Batches(), Batches())
    assert balance.method.stream.state[1] == steps + STEPS


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be")
def test_a_checkpoint_without_a_state_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    other = Balance(mmfuse.OGM, dict(reversed(ENCODERS.items())))
    runs = trainer(tmp_path, other, max_epochs=1)
    runs.fit(Module(AudioVisual(), other), Batches())
    runs.save_checkpoint(path)
    balance = balance_for("OGM")
    with pytest.warns(RuntimeWarning, match=r"no state of Balance for .'audio', 'visual'.: the"):
        fit(tmp_path, AudioVisual(), Batches(), balance, ckpt_path=path)


def test_deepspeed_is_refused() -> None:
    class DeepSpeedStrategy:
        pass

    balance = balance_for("OGM")
    with pytest.raises(ValueError, match="modulated under DeepSpeedStrategy, which keeps them"):
        balance.on_fit_start(SimpleNamespace(strategy=DeepSpeedStrategy()), nn.Module())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="method must be callable on encoders, got OGM"):
        Balance(mmfuse.OGM(AudioVisual().encoders), ENCODERS)
    with pytest.raises(TypeError, match="encoders must map names to patterns, got list"):
        Balance(mmfuse.OGM, list(ENCODERS))
    with pytest.raises(ValueError, match="log_every must be at least 0 or None, got -1"):
        Balance(mmfuse.OGM, ENCODERS, log_every=-1)


@pytest.mark.parametrize("make", [nn.ModuleDict, lambda encoders: mmfuse.OPM()])
def test_a_method_that_does_not_act_on_gradients(tmp_path: Path, make: Any) -> None:
    with pytest.raises(TypeError, match=r"acts on gradients .*, got (ModuleDict|OPM)"):
        fit(tmp_path, AudioVisual(), Batches(), Balance(make, ENCODERS))


def test_a_module_of_the_model_says_that_it_is_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"OPM is a module .*: self\.opm = mmfuse\.OPM\(\)"):
        fit(tmp_path, AudioVisual(), Batches(), Balance(mmfuse.OPM, ENCODERS))


@pytest.mark.parametrize("kind", TWO_GRADIENTS)
def test_a_method_that_makes_the_backward_passes(tmp_path: Path, kind: str) -> None:
    with pytest.raises(TypeError, match=f"{kind} makes its two backward passes itself, but the"):
        fit(tmp_path, AudioVisual(), Batches(), Balance(mmfuse.METHODS[kind], ENCODERS))


@pytest.mark.parametrize("every", [1, 5])
def test_scalars_go_to_all_loggers(tmp_path: Path, every: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    balance = balance_for("InfoReg", log_every=every)
    module = fit(tmp_path, AudioVisual(), Batches(), balance, logger=loggers)
    steps = list(range(0, EPOCHS * STEPS, every))
    events = EventAccumulator(loggers[0].log_dir).Reload()
    for field in ("coefficients", "scores", "information_gap"):
        for m, name in enumerate(ENCODERS):
            found = events.Scalars(f"{field}/{name}")
            assert [e.step for e in found] == steps
            values = [getattr(module.results[i], field)[m] for i in steps]
            assert [e.value for e in found] == torch.stack(values).float().tolist()
    assert [e.value for e in events.Scalars("finite")] == [1.0] * len(steps)
    rows = Path(loggers[1].log_dir, "metrics.csv").read_text().splitlines()
    assert "scores/visual" in rows[0] and len(rows) == 1 + len(steps)


@pytest.mark.parametrize("never", [0, None])
def test_no_scalars(tmp_path: Path, never: int | None) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, AudioVisual(), Batches(), balance_for("OGM", log_every=never), logger=logger)
    assert not Path(logger.log_dir, "metrics.csv").exists()


class Keep(Callback):
    """Has every rank write down its parameters and its decisions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        kept = {
            "world": trainer.world_size,
            "net": pl_module.net.state_dict(),
            "scores": torch.stack([r.scores for r in pl_module.results]),
            "own": torch.stack(pl_module.own),
            "stream": pl_module.balance.method.stream.state,
        }
        torch.save(kept, self.folder / f"rank{trainer.global_rank}.pt")
        # Lightning leaves gloo's group to the exit, where its threads may abort the process.
        atexit.register(dist.destroy_process_group)


class Ranked(Module):
    def __init__(self, net: AudioVisual, balance: Balance) -> None:
        super().__init__(net, balance)
        self.own: list[Tensor] = []

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        loss, seen = forward(self.net, data)
        logits, labels = seen["logits"], seen["labels"]
        self.own.append(mmfuse.ops.modality_scores(list(logits.values()), labels).prob.detach())
        self.balance.observe(logits, labels)
        return loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sync_dist")
def test_two_ranks_decide_the_same(tmp_path: Path) -> None:
    samples = torch.utils.data.TensorDataset(*batch(24))
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    balance = Balance(mmfuse.OGM, ENCODERS)  # each rank would have a seed of its own
    module = Ranked(AudioVisual(), balance)
    trainer(tmp_path, balance, Keep(tmp_path), devices=2, strategy="ddp_spawn", max_epochs=2).fit(
        module, loader
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["world"] == 2
    for kind in ("audio_net", "visual_net", "fc"):
        for key in first["net"]:
            if key.startswith(kind) and "running" not in key:  # batch norm sees its rank alone
                assert torch.equal(first["net"][key], second["net"][key]), key
    assert_same(first["stream"], second["stream"])
    assert first["stream"][1] == 6  # 24 samples in batches of 4 on two ranks, twice
    assert torch.equal(first["scores"], second["scores"])
    # Both batches have 4 samples: float64 sums of 2 float32 means, rounded to float32 once.
    mean = (first["own"].double() + second["own"].double()) / 2
    torch.testing.assert_close(first["scores"], mean.float(), rtol=2**-22, atol=0)
    assert not torch.equal(first["own"], second["own"])


class Sharded(Module):
    """Its parameters are replaced by shards when the fit starts."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.net.audio_net, self.net.visual_net, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train_sharded(folder: Path) -> None:
    """A run on two ranks, and one that is resumed from a checkpoint within its second epoch."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def run(path: Path | None) -> Module:
        torch.manual_seed(0)
        balance = balance_for("InfoReg")
        module = Sharded(AudioVisual(), balance)
        strategy = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=STEPS + 1)
        trainer(folder, balance, saving, devices=2, strategy=strategy).fit(
            module, Batches(), ckpt_path=path
        )
        return module

    whole, resumed = run(None), run(folder / f"step={STEPS + 1}.ckpt")
    assert acted(whole.balance.method, whole.results)
    assert len(resumed.results) == EPOCHS * STEPS - STEPS - 1
    for a, b in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
    state = whole.balance.state_dict()
    assert_same(resumed.balance.state_dict(), state)
    anchors = state["anchors"]["tensors"]
    modulated = whole.balance.method.modalities.parameters
    assert [type(t) for t in anchors] == [Tensor] * len(modulated)
    assert [t.shape for t in anchors] == [p.shape for p in modulated]
    (folder / f"rank{whole.global_rank}").touch()
    dist.destroy_process_group()  # Lightning does it for NCCL alone; gloo's exit may abort


@pytest.mark.slow
def test_sharded_parameters_and_their_checkpoints(tmp_path: Path) -> None:
    """The test is a script of its own, which Lightning starts once more for the second rank."""
    adapters = Path(__file__).parent
    tests = adapters.parent
    paths = [str(path) for path in (adapters, tests / "support", tests.parent)]
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = {paths!r}\n"
        "from test_lightning import train_sharded\n"
        "train_sharded(Path(__file__).parent)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists()


def test_mmfuse_does_not_need_lightning_and_the_adapter_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import mmfuse, mmfuse.adapters\n"
        "print('imported')\n"
        "import mmfuse.adapters.lightning\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "imported\n")
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: mmfuse.adapters.lightning needs Lightning: pip install lightning"
    )


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "lightning_ogm.py"
    ended = subprocess.run(
        [sys.executable, str(script), "--epochs", "3", "--logs", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("test accuracy ")
    # Ten classes: guessing gives 0.1.
    assert float(last.split()[2].rstrip("%,")) > 50.0
    assert list(tmp_path.rglob("events.out.tfevents.*"))


ADAM_DIVIDES = (
    r"Adam divides a gradient by its own recent size, .* use OGM\(\.\.\., apply_to=\"update\"\)"
)


def test_an_adaptive_optimizer_is_warned_of_once(tmp_path: Path) -> None:
    net, data = AudioVisual(), Batches()
    with pytest.warns(RuntimeWarning, match=ADAM_DIVIDES) as seen:
        fit(tmp_path, net, data, Balance(mmfuse.OGM, ENCODERS), make_optimizer=adam)
    assert sum("divides a gradient" in str(w.message) for w in seen) == 1


@pytest.mark.parametrize("name", ["InfoReg", "RedReg"])
def test_methods_that_add_to_gradients_are_not(tmp_path: Path, name: str) -> None:
    """Warnings are errors in the tests; `apply_to="update"` is nothing for these."""
    fit(tmp_path, AudioVisual(), Batches(), balance_for(name), make_optimizer=adam)


def test_an_encoder_that_was_replaced_between_two_fits(tmp_path: Path) -> None:
    """The names lead to the new one; the method of the old one would modulate nothing."""
    net, data = AudioVisual(), Batches()
    balance = balance_for("OGM")
    module = Module(net, balance)
    trainer(tmp_path, balance).fit(module, data)
    first = balance.method
    data.next = 0
    trainer(tmp_path, balance).fit(module, data)
    assert balance.method is first, "nothing was replaced"
    net.audio_net = copy.deepcopy(net.audio_net)
    data.next = 0
    trainer(tmp_path, balance).fit(module, data)
    assert balance.method is not first
    mine = {id(p) for p in balance.method.modalities.parameters}
    assert {id(p) for p in net.audio_net.parameters()} <= mine


class Within(Module):
    """A module whose network contains a method; the callback may have none."""

    def __init__(self, kind: str, balance: Balance | None = None, **options: Any) -> None:
        super().__init__(AudioVisual(), balance)  # type: ignore[arg-type]
        self.within = make_method(kind, {}, **options)
        self.epochs: list[int] = []
        self.modes: list[bool] = []

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        self.epochs.append(self.within.epoch)
        self.modes.append(self.within.training)
        if self.balance is not None:
            return super().training_step(data, batch_idx)
        return forward(self.net, data)[0]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes nothing."""

    def validation_step(self, data: Data, batch_idx: int) -> None:
        self.modes.append(self.within.training)


@pytest.mark.parametrize("callback", ["Balance", "Epochs"])
@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_method_in_the_module_hears_of_the_epochs(
    kind: str, callback: str, tmp_path: Path
) -> None:
    balance = Balance(mmfuse.OGM, ENCODERS) if callback == "Balance" else None
    module = Within(kind, balance, starts=1)
    for _ in range(2):  # a second fit begins with the first epoch again
        trainer(tmp_path, balance or Epochs(), max_epochs=2).fit(module, Batches(), Batches(1))
    assert module.epochs == ([0] * STEPS + [1] * STEPS) * 2
    # Before the first epoch Lightning tries the validation, too.
    assert module.modes == ([False] + ([True] * STEPS + [False]) * 2) * 2


@pytest.mark.parametrize("callback", ["Balance", "Epochs"])
@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_method_in_the_module_goes_on_in_its_epoch(
    kind: str, callback: str, tmp_path: Path
) -> None:
    """The run stops in the middle of its second epoch, and goes on there."""
    modules = []
    for limit, path in (({"max_steps": STEPS + 1}, None), ({}, tmp_path / "last.ckpt")):
        balance = Balance(mmfuse.OGM, ENCODERS) if callback == "Balance" else None
        saving = ModelCheckpoint(tmp_path, "last", every_n_train_steps=STEPS + 1)
        modules.append(Within(kind, balance, starts=1))
        run = trainer(tmp_path, balance or Epochs(), saving, **{"max_epochs": 3, **limit})
        run.fit(modules[-1], Batches(), Batches(1), ckpt_path=path)
    first, resumed = (module.epochs for module in modules)
    assert first == [0] * STEPS + [1]
    assert resumed == [1] * (STEPS - 1) + [2] * STEPS


class Unrecorded(Module):
    """It looks at its logits apart from the loss."""

    def training_step(self, data: Data, batch_idx: int) -> Tensor:
        loss, seen = forward(self.net, data)
        with torch.no_grad():
            self.balance.observe(seen["logits"], seen["labels"])
        return loss


def test_where_no_gradients_are_recorded_it_trains_still(tmp_path: Path) -> None:
    """No warning, as `observe` of a method alone has."""
    balance = Balance(mmfuse.OGM, ENCODERS)
    trainer(tmp_path, balance, max_epochs=1).fit(Unrecorded(AudioVisual(), balance), Batches())
    assert balance.result.finite
