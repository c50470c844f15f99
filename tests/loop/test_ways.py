"""Masks, other losses and scores of one's own with every method: in real training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import ways
from balancing import (
    CONSTANT,
    DROPPING,
    IN_FORWARD,
    KINDS,
    ON_FEATURES,
    ON_GRADIENTS,
    STEPPING,
    TWO_GRADIENTS,
    WITH_MORE,
    Shown,
    arguments,
    balance,
    make,
    show,
    start,
)
from ranks import ranks
from states import differences
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmfuse
from mmfuse import NoiseStream
from mmfuse.loop.shards import whole_state

ROWS = 16
SAME = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
Data = tuple[Tensor, Tensor, Tensor]


class Net(nn.Module):
    """Two encoders and a head, which also sees each modality alone and a fused representation."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.visual_net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 6))
        self.fc = nn.Linear(12, ways.CLASSES)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}

    def forward(self, method: Any, way: str, data: Data, masks: Any, absent: Any = ()) -> Shown:
        """The forward pass, through the method if it acts there; zeros stand for what is absent."""
        inputs, labels = dict(zip(self.encoders, data[:2], strict=True)), data[2]
        zeros = data[0].new_zeros(len(labels), 6)
        features = {n: zeros if n in absent else net(inputs[n]) for n, net in self.encoders.items()}
        if masks is not None:
            features = {n: f * masks[n].unsqueeze(1) for n, f in features.items()}
        a, v = features.values()
        fused = a + 0.5 * v
        seen = {
            "way": way,
            "present": masks,
            "logits": {
                "audio": self.fc(torch.cat([a, zeros], 1)),
                "visual": self.fc(torch.cat([zeros, v], 1)),
            },
            "labels": labels,
            "features": features,
            "inputs": inputs,
            "fused": fused,
            "fused_logits": self.fc(torch.cat([fused, fused], 1)),
        }
        return show(method, self.fc, seen)


def data(step: int) -> Data:
    """Audio that gives the class away."""
    generator = torch.Generator().manual_seed(40 + step)
    labels = torch.randint(0, ways.CLASSES, (ROWS,), generator=generator)
    audio, visual = (torch.randn(ROWS, n, generator=generator).double() for n in (4, 5))
    return audio + 2 * labels.unsqueeze(1), visual, labels


def masks_of(way: str, labels: Tensor, first: int = 0) -> dict[str, Tensor] | None:
    """The masks: the second half of the whole batch has no audio."""
    if way != "present":
        return None
    rows = torch.arange(len(labels)) + first
    return {"audio": (labels != 0) & (rows < ROWS // 2), "visual": labels != 1}


class Run:
    """A model and a method on it, and one training step after another."""

    def __init__(self, kind: str, way: str) -> None:
        torch.manual_seed(3)
        self.model = Net().double()
        self.wrapped: nn.Module = self.model
        self.way = way
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, foreach=False)
        self.make: Callable[[], Any] = lambda: make(
            kind, self.model.encoders, stream=NoiseStream(3), **ways.options(way)
        )
        self.begin()

    def begin(self) -> None:
        self.method = self.make()
        start(self.method)

    def show(self, step: int, rows: slice = slice(None), absent: Any = ()) -> Shown:
        part = tuple(x[rows] for x in data(step))
        masks = masks_of(self.way, part[2], rows.start or 0)
        return self.wrapped(self.method, self.way, part, masks, absent)

    def step(self, step: int, scaler: Any = None, **where: Any) -> list[Any]:
        """One training step; what was decided."""
        self.optimizer.zero_grad()
        shown = self.show(step, **where)
        if scaler is None:
            out = balance(self.method, shown)
            self.optimizer.step()
            return decided(out)

        def unscaled() -> dict[str, Any]:
            scaler.unscale_(self.optimizer)
            return {"found_inf": mmfuse.amp.found_inf(scaler, self.optimizer)}

        out = balance(self.method, shown, scale=scaler.scale, between=unscaled)
        scaler.step(self.optimizer)
        scaler.update()
        return decided(out)

    def state(self) -> Any:
        parts = {"model": dict(self.model.state_dict()), "method": dict(self.method.state_dict())}
        return copy.deepcopy(whole_state(parts))


def decided(out: Any) -> list[Tensor]:
    """The numbers of a result; features and masks are of each sample."""
    found = [getattr(out, field.name) for field in fields(out)]
    return [x.detach().double() for x in found if isinstance(x, Tensor) and x.dim() < 2]


def acts_by_loss(kind: str) -> bool:
    return mmfuse.METHODS[KINDS[kind].method].card.acts == "loss"


def acted(kind: str, run: Run, out: list[Tensor]) -> bool:
    """True if the first of the numbers, coefficients or the like, are not those of nothing."""
    if kind in IN_FORWARD:  # a loss, or factors and the like
        neutral = 0.0 if acts_by_loss(kind) else 1.0
        return bool(out[0].isfinite().all()) and bool((out[0] != neutral).any())
    if kind in CONSTANT:
        return True
    return bool((out[0] != run.method.rule.need.neutral).any())


@pytest.mark.parametrize(("kind", "way"), [c for c in WITH_MORE if c[0] not in TWO_GRADIENTS])
def test_it_is_what_decides(kind: str, way: str) -> None:
    """The same batch with and without it decides differently; own scores are taken as they are.

    A loss that compares no scores is another one.
    """
    found = []
    for told in (True, False):
        run = Run(kind, way if told else "")
        shown = Run(kind, way).show(0)
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)
        given = arguments(run.method, {**shown.seen, "way": way if told else None})
        found.append((run.method if kind in IN_FORWARD else run.method.step)(**given))
        if told and way == "scores":
            own = torch.stack([given["scores"][n] for n in shown.seen["features"]]).double()
            assert any(torch.allclose(found[0].scores.double(), p) for p in (own, own.log()))
            return
    # A monitor and an average speak of the features alone.
    shown = "scores" if hasattr(found[0], "scores") else "loss"
    first, second = (getattr(out, shown).detach() for out in found)
    assert float((first - second).abs().min()) > 1e-4


@pytest.mark.parametrize(("kind", "way"), WITH_MORE)
def test_a_resumed_run_goes_on_with_the_same_bits(kind: str, way: str) -> None:
    whole, parts = Run(kind, way), Run(kind, way)
    results = [whole.step(i) for i in range(4)]
    for i in range(2):
        parts.step(i)
    saved = copy.deepcopy(parts.method.state_dict())
    parts.begin()
    parts.method.load_state_dict(saved)
    for i in range(2, 4):
        assert differences(parts.step(i), results[i]) == []
    assert differences(parts.state(), whole.state()) == []
    assert any(acted(kind, whole, out) for out in results)


@pytest.mark.parametrize(("kind", "way"), WITH_MORE)
def test_scaled_gradients_are_unscaled_ones(kind: str, way: str) -> None:
    """A power of two rounds nothing; and a step that the scaler skips leaves no trace."""
    plain, scaled = Run(kind, way), Run(kind, way)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for i in range(2):
        out, want = scaled.step(i, scaler), plain.step(i)
        torch.testing.assert_close(out, want, **SAME)
    torch.testing.assert_close(scaled.state()["model"], plain.state()["model"], **SAME)
    if kind in IN_FORWARD:
        return
    before = scaled.state()
    before["method"].pop("step", None)  # a monitor counts the calls
    weight = scaled.model.audio_net[0].weight
    handle = weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    scaled.step(2, scaler)
    handle.remove()
    assert scaler.get_scale() == 2.0**9
    after = scaled.state()
    after["method"].pop("step", None)
    assert differences(after, before) == []
    out, want = scaled.step(3, scaler), plain.step(3)
    torch.testing.assert_close(out, want, **SAME)


def averages(scores: list[dict[str, Tensor]], counts: Tensor) -> list[dict[str, Tensor]]:
    """Means of the micro-batches' scores, and of their logarithms for a method that takes these."""
    each = torch.stack([torch.stack(list(own.values())) for own in scores]).double()
    share = (counts / counts.sum()).unsqueeze(1)
    means = (each * share).sum(0), (each.log() * share).sum(0).exp()
    return [dict(zip(scores[0], mean.unbind(), strict=True)) for mean in means]


@pytest.mark.parametrize(("kind", "way"), [c for c in WITH_MORE if c[0] in STEPPING])
def test_micro_batches_are_one_batch(kind: str, way: str) -> None:
    cuts, parts = [slice(0, 5), slice(5, ROWS)], Run(kind, way)
    scores = []
    for piece, rows in zip([parts.show(0, rows) for rows in cuts], cuts, strict=True):
        (piece.loss * (rows.stop - rows.start) / ROWS).backward()
        given = arguments(parts.method, piece.seen)
        parts.method.observe(**given)
        scores.append(given.get("scores"))
    out = decided(parts.method.step())
    assert acted(kind, parts, out)
    changes: list[dict[str, Any]] = [{}]
    if way == "scores":
        changes = [{"scores": own} for own in averages(scores, torch.tensor([5.0, 11.0]))]
    close = []
    for change in changes:
        whole = Run(kind, way)
        shown = whole.show(0)
        shown.loss.backward()
        want = decided(whole.method.step(**{**arguments(whole.method, shown.seen), **change}))
        # A monitor adds 1e-12 to mean squares of 1e-3, once in each part.
        pairs = zip(out, want, strict=True)
        close.append(all(torch.allclose(a, b, 1e-7, 1e-9, True) for a, b in pairs))
    assert any(close)


def on_ranks(rank: int, how: str, kind: str, way: str) -> list[Any]:
    """Decisions of two steps, and the parameters; the second rank has no audio at all."""
    run, size = Run(kind, way), 1 if how == "alone" else 2
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    absent: tuple[str, ...] = ()
    if how == "ddp":
        run.wrapped = DistributedDataParallel(run.model, find_unused_parameters=True)
        if rank and way == "present":
            absent = ("audio",)
    elif how == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
        for part in (*run.model.encoders.values(), run.model.fc, run.model):
            fully_shard(part, mesh=mesh)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, foreach=False)
        run.begin()
    results = [run.step(i, rows=rows, absent=absent) for i in range(2)]
    return [results, run.state()["model"]]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("kind", "way"), WITH_MORE)
def test_ranks_that_differ_are_one_process(kind: str, way: str, how: str) -> None:
    first, second = ranks(2).run(on_ranks, how, kind, way)
    assert differences(first[1], second[1]) == []
    assert any(acted(kind, Run(kind, way), out) for out in first[0])
    # ARM's information and a loss are of each rank, and a score of one's own the mean of two.
    alone = (kind in ON_FEATURES and kind not in DROPPING) or acts_by_loss(kind)
    if alone or way == "scores":
        return
    results, model = on_ranks(0, "alone", kind, way)
    torch.testing.assert_close(first[0], results, rtol=1e-6, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(first[1], model, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("kind", "way"), [c for c in WITH_MORE if c[0] not in TWO_GRADIENTS])
def test_no_graph_break(kind: str, way: str) -> None:
    torch._dynamo.reset()
    eager, compiled = Run(kind, way), Run(kind, way)
    call = compiled.method if kind in IN_FORWARD else compiled.method.step
    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i in range(2):
        results = []
        for run in (eager, compiled):
            run.optimizer.zero_grad()
            if kind in ON_GRADIENTS:
                shown = run.show(i)
                shown.loss.backward()
                seen = shown.seen
                act = fast if run is compiled else run.method.step
            else:
                seen = Run(kind, way).show(i).seen
                act = fast if run is compiled else run.method
            results.append(decided(act(**detached(arguments(run.method, seen)))))
            run.optimizer.step()
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12, equal_nan=True)
        assert differences(compiled.state(), eager.state()) == []
    assert acted(kind, eager, results[0])
    torch._dynamo.reset()


def detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: detached(value) for name, value in values.items()}
    return values.detach() if isinstance(values, Tensor) else values
