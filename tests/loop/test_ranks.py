"""Data parallelism with real ranks: DistributedDataParallel over gloo."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancing import (
    COMBINED,
    CONSTANT,
    DRAWING,
    DROPPING,
    KINDS,
    LOOKING,
    MONITORING,
    ON_GRADIENTS,
    STEPPING,
    TWO_GRADIENTS,
    Shown,
    arguments,
    balance,
    make,
    see,
    show,
)
from epochs import next_epoch
from networks import AudioVisual
from parallel import CLASSES, SAME, counted
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse
from mmfuse.loop import stage
from mmfuse.noise import default_stream


def without_batch_norm() -> AudioVisual:
    """Batch norm sees the rank's own samples; without it a batch is the sum of its parts."""
    model = AudioVisual()
    model.audio_net.bn1 = nn.Identity()
    model.visual_net.bn1 = nn.Identity()
    return model.double()


def whole_batch(step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    audio = torch.randn(size, 1, 9, 8, generator=generator, dtype=torch.float64)
    audio += labels.view(-1, 1, 1, 1)
    return audio, torch.randn(size, 3, 7, 7, generator=generator, dtype=torch.float64), labels


class Run:
    """A training step with one method, or with two together, on a model that may be wrapped."""

    def __init__(self, name: str, model: nn.Module, **options: Any) -> None:
        self.model = model
        plain = getattr(model, "module", model)
        self.head = plain.fc
        self.methods = {k: make(k, plain.encoders, **options) for k in name.split(" + ")}
        for method in self.methods.values():
            if isinstance(method, nn.Module):
                method.to(self.head.weight)

    @property
    def method(self) -> Any:
        """The last one; those before it act in the forward pass."""
        return list(self.methods.values())[-1]

    def show(self, audio: Tensor, visual: Tensor, labels: Tensor) -> Shown:
        """Shows it with sums of losses."""
        a, v, _ = self.model(audio, visual)
        inputs = {"audio": audio, "visual": visual}
        seen = see(self.head, {"audio": a, "visual": v}, inputs, labels)
        first, *_ = self.methods.values()
        return show(first, self.head, seen, reduction="sum")

    def state(self) -> dict[str, Any]:
        states = {kind: dict(method.state_dict()) for kind, method in self.methods.items()}
        for kind, state in states.items():
            for name in ("method", "modalities"):  # names, which assert_close does not compare
                state.pop(name, None)
            if kind in ON_GRADIENTS and kind not in DRAWING:
                state.pop("stream", None)  # agreed upon where it is first drawn from
        return states


def train(
    rank: int,
    name: str,
    sizes: Sequence[int],
    steps: int,
    *,
    batch_norm: bool = False,
    micro_batches: int = 1,
    same_seed: bool = True,
    ignored: Sequence[int] = (),
) -> dict[str, Any]:
    """Trains on this rank's part of each batch; without a group, on the whole."""
    alone = not dist.is_initialized()
    torch.manual_seed(7)
    model = AudioVisual().double() if batch_norm else without_batch_norm()
    wrapped = model if alone else DistributedDataParallel(model)
    torch.manual_seed(7 if same_seed else 100 + rank)
    run = Run(name, wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = list(sizes)
    start = 0 if alone else sum(parts[:rank])
    mine = slice(start, sum(parts) if alone else start + parts[rank])
    results = []
    with counted(dist) as reductions:
        for step in range(steps):
            if step % 2 == 0:
                for method in run.methods.values():
                    next_epoch(method)
            optimizer.zero_grad()
            batches = [
                whole_batch(micro_batches * step + i, sum(parts)) for i in range(micro_batches)
            ]
            for _, _, labels in batches:
                labels[list(ignored)] = -100
            # DDP takes the mean over the ranks: this makes it the mean over all samples.
            count = sum(int((labels != -100).sum()) for _, _, labels in batches)
            share = (1 if alone else len(parts)) / count
            for audio, visual, labels in batches[:-1]:
                with nullcontext() if alone else wrapped.no_sync():
                    shown = run.show(audio[mine], visual[mine], labels[mine])
                    (share * shown.loss).backward()
                run.method.observe(**arguments(run.method, shown.seen))
            shown = run.show(*(x[mine] for x in batches[-1]))
            out = balance(run.method, shown, scale=partial(torch.mul, share))
            optimizer.step()
            results.append([x.detach() for x in vars(out).values() if isinstance(x, Tensor)])
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "results": results,
        "state": run.state(),
        "reductions": reductions,
    }


METHODS = [*KINDS, *COMBINED]
SIZES = [
    pytest.param((7, 4), id="2 ranks"),
    pytest.param((5, 3, 8, 2), id="4 ranks", marks=pytest.mark.slow),
]


def assert_equal(actual: Any, expected: Any, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **tolerance, equal_nan=True)


@pytest.mark.slow_except_for("OGM", "OPM", "INFOREG", "REDREG", "ARM", "MMPARETO")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_replicas_are_bit_equal_after_50_steps(name: str, sizes: tuple[int, ...]) -> None:
    found = ranks(len(sizes)).run(train_50, name, sizes)
    for other in found[1:]:
        for key in ("parameters", "state", *(["results"] if name in ON_GRADIENTS else [])):
            assert_equal(other[key], found[0][key])
    # It was trained, and something was decided.
    start = [p.detach() for p in untrained().parameters()]
    assert all((a != b).any() for a, b in zip(found[0]["parameters"], start, strict=True))
    if name in ON_GRADIENTS and name not in CONSTANT:
        coefficients = torch.stack([r[0] for r in found[0]["results"]])
        assert coefficients.unique().numel() > 20


def untrained() -> AudioVisual:
    torch.manual_seed(7)
    return AudioVisual().double()


def train_50(rank: int, name: str, sizes: Sequence[int]) -> dict[str, Any]:
    return train(rank, name, sizes, 50, batch_norm=True, same_seed=False)


@pytest.mark.parametrize("name", [kind for kind in ON_GRADIENTS if kind not in MONITORING])
@pytest.mark.parametrize("sizes", SIZES)
def test_ranks_equal_one_process_with_the_whole_batch(name: str, sizes: tuple[int, ...]) -> None:
    expected = train(0, name, sizes, 6)
    found = ranks(len(sizes)).run(train, name, sizes, 6)
    assert_equal(found[0]["parameters"], expected["parameters"], **SAME)
    assert_equal(found[0]["results"], expected["results"], **SAME)


@pytest.mark.parametrize("name", [*MONITORING, *DROPPING, *COMBINED])
def test_noise_on_samples_is_that_of_the_whole_batch(name: str) -> None:
    # If all ranks have as many samples, each draws the numbers of its rows of the whole batch.
    expected = train(0, name, (6, 6), 6)
    found = ranks(2).run(train, name, (6, 6), 6)
    assert_equal(found[0]["parameters"], expected["parameters"], **tolerance_of(name))
    assert_equal(found[1]["state"], found[0]["state"])
    if name in MONITORING:
        assert_equal(redundancy(found[0]), redundancy(expected), **tolerance_of(name))


def tolerance_of(name: str) -> dict[str, float]:
    # The views' noise is float32 arithmetic in vectors of 8: another alignment, another rounding,
    # 5e-7 of a deviate. It enters a ratio of which coefficients above 0 are made smoothly.
    return {"rtol": 1e-5, "atol": 1e-6} if name in MONITORING else SAME


def redundancy(found: dict[str, Any]) -> Tensor:
    (state,) = found["state"].values()
    return state["state"]["redundancy"]


def accumulate(
    rank: int, name: str, sizes: Sequence[int], micro_batches: int, ignored: Sequence[int]
) -> dict[str, Any]:
    return train(rank, name, sizes, 4, micro_batches=micro_batches, ignored=ignored)


@pytest.mark.parametrize(
    ("name", "sizes"), [(kind, (6, 6) if kind in MONITORING else (7, 4)) for kind in STEPPING]
)
def test_accumulated_gradients_are_modulated_once_with_all_scores(
    name: str, sizes: tuple[int, ...]
) -> None:
    expected = accumulate(0, name, sizes, 3, ())
    found = ranks(2).run(accumulate, name, sizes, 3, ())
    assert_equal(found[0]["parameters"], expected["parameters"], **tolerance_of(name))
    assert_equal(found[0]["results"], expected["results"], **tolerance_of(name))
    if name in MONITORING:
        assert_equal(redundancy(found[0]), redundancy(expected), **tolerance_of(name))


@pytest.mark.parametrize("name", MONITORING)
def test_views_of_micro_batches_are_those_of_one_batch(name: str) -> None:
    """Redundancy and gate from parts of 2, 5 and 3 rows are those of all 10."""
    torch.manual_seed(3)
    model = without_batch_norm()
    audio, visual, labels = whole_batch(0, 10)
    found = []
    for cuts in ([10], [2, 5, 3]):
        run = Run(name, model, stream=mmfuse.NoiseStream(5))
        next_epoch(run.method)
        for part in torch.arange(10).split(cuts):
            model.zero_grad()
            shown = run.show(audio[part], visual[part], labels[part])
            shown.loss.backward()
            run.method.observe(**arguments(run.method, shown.seen))
        out = run.method.step()
        found.append([out.redundancy, out.scores, out.gate])
    assert_equal(found[1], found[0], **tolerance_of(name))


@pytest.mark.parametrize("name", [kind for kind in STEPPING if kind not in MONITORING])
def test_a_rank_without_labelled_samples_does_not_count(name: str) -> None:
    ignored = tuple(range(7))  # all of the first rank's
    expected = accumulate(0, name, (7, 4), 2, ignored)
    found = ranks(2).run(accumulate, name, (7, 4), 2, ignored)
    assert_equal(found[0]["parameters"], expected["parameters"], **SAME)
    assert all(r[1].isfinite().all() for r in found[1]["results"])


@pytest.mark.parametrize("name", METHODS)
def test_one_reduction_a_step(name: str) -> None:
    """It is small; a method with two gradients also reduces those that are not DDP's."""
    steps, modalities = 3, 2
    model = without_batch_norm()
    encoders = sum(p.numel() for net in model.encoders.values() for p in net.parameters())
    for found in ranks(2).run(train, name, (4, 4), steps):
        looking = [part for part in name.split(" + ") if part in (*LOOKING, *ON_GRADIENTS)]
        assert len(found["reductions"]) == len(looking) * steps
        if name in TWO_GRADIENTS:
            assert set(found["reductions"]) == {encoders}
        else:
            assert max(found["reductions"], default=0) <= 4 * modalities


def functional(rank: int, process_group: Any) -> dict[str, Any]:
    """`ogm_backward` in place of `loss.backward()`, with another seed on every rank."""
    torch.manual_seed(7)
    model = without_batch_norm()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.manual_seed(200 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        audio, visual, labels = whole_batch(step, 8)
        mine = slice(0, 5) if rank == 0 else slice(5, 8)
        optimizer.zero_grad()
        a, v, out = wrapped(audio[mine], visual[mine])
        logits = mmfuse.unimodal_logits(model.fc, {"audio": a, "visual": v})
        result = mmfuse.ogm_backward(
            F.cross_entropy(out, labels[mine]),
            model.encoders,
            logits,
            labels[mine],
            process_group=process_group,
        )
        optimizer.step()
    return {"parameters": [p.detach() for p in model.parameters()], "scores": result.scores}


def test_the_functional_form_keeps_replicas_equal() -> None:
    first, second = ranks(2).run(functional, None)
    assert_equal(second, first)


def test_without_reduction_replicas_drift() -> None:
    # Users know why they pass `process_group=False`; here it shows what the other choices do.
    first, second = ranks(2).run(functional, False)
    assert (first["scores"] != second["scores"]).any()
    assert any(
        (a != b).any() for a, b in zip(first["parameters"], second["parameters"], strict=True)
    )


def reseeded(rank: int) -> tuple[list[int], list[Tensor]]:
    """The second rank seeds PyTorch anew between two steps, as for a data loader."""
    device, found = torch.device("cpu"), []
    nets = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b")})
    stream = default_stream(device)
    for step in range(3):
        nets.zero_grad()
        if rank == 1 and step:
            torch.manual_seed(300 + step)
        logits = {name: net(torch.ones(4, 3)) for name, net in nets.items()}
        loss = F.cross_entropy(sum(logits.values()), torch.tensor([0, 1, 0, 1]))
        mmfuse.ogm_backward(loss, dict(nets.items()), logits, torch.tensor([0, 1, 0, 1]))
        found.append([p.grad for p in nets.parameters()])
    assert default_stream(device) is stream
    return stream.state.tolist(), found


def test_a_rank_that_seeds_anew_does_not_wait_for_the_others() -> None:
    """It would, in a broadcast of the stream that the others have already."""
    first, second = ranks(2).run(reseeded)
    assert_equal(second, first)


def with_noise(rank: int, process_group: Any) -> list[str]:
    """Warnings of a callable that makes each rank's own noise, in two steps of two objects."""
    stage._warned.clear()
    nets = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b")})
    told = []
    for _ in range(2):
        ogm = mmfuse.OGM(dict(nets.items()), noise=torch.randn_like, process_group=process_group)
        for _ in range(2):
            nets.zero_grad()
            logits = {name: net(torch.ones(4, 3)) for name, net in nets.items()}
            sum(z.square().sum() for z in logits.values()).backward()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                ogm.step({n: z.detach() for n, z in logits.items()}, torch.tensor([0, 1, 0, 1]))
            told += [str(w.message) for w in seen if w.category is RuntimeWarning]
    return told


def test_noise_that_each_rank_makes_is_told_once() -> None:
    for (message,) in ranks(2).run(with_noise, None):
        assert message.startswith("OGM: the callable noise= makes other numbers on each rank")
    assert ranks(2).run(with_noise, False) == [[], []]


def in_half_the_world(rank: int) -> tuple[Tensor, Tensor]:
    """Two groups of two ranks, each with a method of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank)
    encoders = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    for encoder in encoders.values():
        for p in encoder.parameters():
            p.grad = torch.ones_like(p)
    logits = {name: torch.randn(4, 3) for name in encoders}
    labels = torch.randint(0, 3, (4,))
    ogm = mmfuse.OGM(encoders, process_group=groups[rank // 2])
    own = mmfuse.ops.modality_scores(list(logits.values()), labels).prob
    return ogm.step(logits, labels).scores, own


def test_scores_are_averaged_over_the_given_group() -> None:
    found = ranks(4).run(in_half_the_world)
    for pair in (found[:2], found[2:]):
        mean = (pair[0][1] + pair[1][1]) / 2
        for scores, _ in pair:
            assert_equal(scores, mean, rtol=1e-6, atol=0)  # one rounding to float32


@pytest.mark.parametrize("wrong", [True, "world", 3])
def test_a_group_that_is_none_is_refused(wrong: Any) -> None:
    encoders = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    for kind in KINDS:
        with pytest.raises(TypeError, match="process_group must be a ProcessGroup, None"):
            make(kind, encoders, process_group=wrong)
