"""Shapley responses: the shares of the joint outputs, and that the passes leave no trace."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mmfuse

SIZES = {"audio": 5, "visual": 7, "text": 3, "pose": 4}
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


class Fusion(nn.Module):
    """Products of features, batch norm and dropout: no share is one modality's own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.names = list(SIZES)[:count]
        self.stems = nn.ModuleDict({n: nn.Linear(SIZES[n], 8) for n in self.names})
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, **given: Tensor) -> Tensor:
        found = [self.stems[n](given[n]).sigmoid() for n in self.names]
        return self.head(self.drop(self.norm(torch.stack(found).prod(0))))


def made(count: int) -> tuple[Fusion, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Fusion(count).double()
    data = {n: torch.randn(6, SIZES[n], dtype=torch.float64) for n in model.names}
    for _ in range(3):  # the statistics are of something
        model(**data)
    return model, data


def by_orders(model: Fusion, data: dict[str, Tensor], fill: float = 0.0) -> dict[str, Tensor]:
    """The mean, over all orders of the modalities, of what each adds to those before it."""
    f = {tuple(data): model(**data)}
    model.eval()
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def at(there: tuple[str, ...]) -> Tensor | float:
        there = tuple(n for n in data if n in there)
        if not there:
            return 0.0
        if there not in f:
            given = {n: x if n in there else torch.full_like(x, fill) for n, x in data.items()}
            f[there] = torch.func.functional_call(model, buffers, (), given)
        return f[there]

    orders = list(itertools.permutations(data))
    found = {
        n: sum(at(o[: o.index(n) + 1]) - at(o[: o.index(n)]) for o in orders) / len(orders)
        for n in data
    }
    model.train()
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
def test_they_are_the_means_over_all_orders(count: int) -> None:
    model, data = made(count)
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    found = mmfuse.shapley_responses(model, data)
    torch.manual_seed(5)
    expected = by_orders(other, data)
    torch.manual_seed(5)
    joint = copy.deepcopy(other)(**data)
    torch.testing.assert_close(sum(found.values()), joint)
    assert list(found) == list(data)
    factors = dict(zip(data, (1.0, 0.3, 2.0, 0.7), strict=False))
    for each in (found, expected):
        sum(factors[n] * F.cross_entropy(r, LABELS) for n, r in each.items()).backward()
    for name, r in expected.items():
        torch.testing.assert_close(found[name], r)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Counting(nn.Module):
    """Counts its calls in a buffer, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + 0 * torch.rand(())


def test_only_the_joint_pass_leaves_traces() -> None:
    model, data = made(2)
    model.norm = nn.Sequential(model.norm, Counting())
    model.stems["audio"].eval()  # frozen by the user
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    responses = mmfuse.shapley_responses(model, data)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    other(**data)
    assert torch.equal(torch.rand(3), drawn)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name
    flags = [m.training for m in model.modules()]
    assert flags == [m.training for m in other.modules()] and not all(flags)
    assert all(r.requires_grad for r in responses.values())


def test_a_later_joint_pass_does_not_change_the_gradients() -> None:
    """It moves the statistics that the graph of an evaluation pass keeps, and PyTorch says nothing.

    As with several micro-batches before one backward pass.
    """
    model, data = made(2)
    loss = F.cross_entropy(mmfuse.shapley_responses(model, data)["audio"], LABELS)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    mmfuse.shapley_responses(model, {n: 3 + x for n, x in data.items()})
    found = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, found, expected))


def test_an_error_within_a_pass_leaves_the_mode_as_it_was() -> None:
    model, data = made(2)
    calls = iter(range(9))

    def forward(given: dict[str, Tensor]) -> Tensor:
        if next(calls) == 2:
            raise KeyError("gone")
        return model(**given)

    with pytest.raises(KeyError, match="gone"):
        mmfuse.shapley_responses(model, data, forward=forward)
    assert all(m.training for m in model.modules())


def test_baseline_forward_and_output() -> None:
    model, data = made(3)
    model.eval()
    expected = by_orders(copy.deepcopy(model).eval(), data, fill=0.5)
    found = mmfuse.shapley_responses(
        lambda **given: {"z": model(**given)},
        data,
        baseline=lambda name, x: torch.full_like(x, 0.5),
        forward=lambda given: {"z": model(**given)},
        output=lambda out: out["z"],
    )
    for name, r in expected.items():
        torch.testing.assert_close(found[name], r)


def test_half_precision_adds_up_in_float32() -> None:
    model, data = made(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mmfuse.shapley_responses(model.float(), {n: x.float() for n, x in data.items()})
    assert {r.dtype for r in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "inputs", "more", "error", "text"),
    [
        (made(2)[0], {"audio": torch.ones(2, 5)}, {}, ValueError, "at least two modalities"),
        (made(2)[0], [1], {}, TypeError, "inputs must map names to tensors, got list"),
        (made(2)[0], made(2)[1], {"baseline": "one"}, ValueError, "baseline must be one of"),
        (
            lambda audio, visual: (audio, visual),
            made(2)[1],
            {},
            TypeError,
            "the model returns tuple for all modalities, not a tensor: say with output=",
        ),
        (
            lambda audio, visual: audio[: 1 + int(bool((visual != 0).any()))],
            made(2)[1],
            {},
            ValueError,
            r"has shape \[2, 5\] for all modalities, and \[1, 5\] where 'audio' alone are there",
        ),
    ],
)
def test_bad_arguments(
    model: Any, inputs: Any, more: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        mmfuse.shapley_responses(model, inputs, **more)


def gradients(model: nn.Module, rows: slice, agm: mmfuse.AGM) -> list[Tensor]:
    """The gradients after two steps, so that the second one's ratios have something to compare."""
    _, data = made(2)
    for _ in range(2):
        model.zero_grad()
        out = agm(
            mmfuse.shapley_responses(model, {n: x[rows] for n, x in data.items()}), LABELS[rows]
        )
        F.cross_entropy(sum(out.logits.values()), LABELS[rows]).backward()
    return [p.grad for p in model.parameters()]


def of_rank(rank: int) -> list[Tensor]:
    model = made(2)[0].eval()  # whose outputs do not depend on other samples
    wrapped = DistributedDataParallel(model)
    if rank == 0:
        with pytest.raises(ValueError, match="forward= would call a DistributedDataParallel"):
            mmfuse.shapley_responses(wrapped, made(2)[1], forward=lambda given: wrapped(**given))
    return gradients(wrapped, slice(3 * rank, 3 * rank + 3), mmfuse.AGM())


def test_two_ranks_are_one_with_the_whole_batch() -> None:
    expected = gradients(made(2)[0].eval(), slice(None), mmfuse.AGM())
    for found in ranks(2).run(of_rank):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert math.isfinite(sum(float(g.sum()) for g in expected))


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_a_model_may_change_its_inputs_in_place(baseline: Any) -> None:
    class InPlace(nn.Module):
        def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
            return audio.relu_().add_(1) * visual.neg_()

    data = {n: torch.randn(6, 3) for n in ("audio", "visual")}
    before = {n: x.clone() for n, x in data.items()}
    found = mmfuse.shapley_responses(InPlace(), data, baseline=baseline)
    assert all(torch.equal(x, before[n]) for n, x in data.items())
    mask = {n: (x * 0 if baseline == "zero" else x.mean(0).expand(6, 3)) for n, x in data.items()}

    def f(audio: Tensor, visual: Tensor) -> Tensor:
        return -(audio.relu() + 1) * visual

    joint, alone = f(**data), f(data["audio"], mask["visual"])
    expected = (joint - f(mask["audio"], data["visual"]) + alone) / 2
    assert torch.allclose(found["audio"], expected)
