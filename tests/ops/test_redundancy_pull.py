"""redundancy_pull: every backend against the paper's formulas in float64, and at the edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import tolerances
import torch
from cells import Cell
from torch import Tensor

from mmfuse import ops
from mmfuse.ops import GradStats, RedundancyRule, RedundancyState

FLOAT = (torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")
EPS = 1e-12


@dataclass
class Expected:
    """Lists of M numbers each; the terms of the phase beside it."""

    beta: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)
    phase: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    history: list[list[float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    redundancy: list[float] = field(default_factory=list)
    average: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)


def expected(
    s: Tensor, red: Tensor | None, gate: float, state: RedundancyState, rule: RedundancyRule
) -> Expected:
    """The paper's equations, modality by modality; `s[m][j]` is that of m where j is too."""
    out = Expected()
    count, window = len(s), state.history.shape[1] - 1
    for m in range(count):
        h = float(s[m][m])
        row, steps = state.history[m].tolist(), int(state.steps[m])
        last, average, weight = (float(x[m]) for x in state[2:])
        if math.isfinite(h):
            row, steps = [*row[1:], h], steps + 1
        if red is not None:
            measured = float(red[m])
            last = measured if math.isfinite(h) else last
            if math.isfinite(measured):
                average = rule.momentum * average + (1 - rule.momentum) * measured
                weight = rule.momentum * weight + (1 - rule.momentum)
        growth = 1.0
        if steps > window:
            growth = (row[-1] - row[0]) / (abs(math.fsum(row[:-1])) + window * EPS)
        ratio = last / ((average / weight if rule.unbiased else average) + EPS)
        phase = ratio - rule.gamma * max(growth, 0.0)
        ahead = [float(s[m][j] - s[j][m]) for j in range(count) if j != m]
        ahead = [x for x in ahead if not math.isnan(x)]
        beta = 0.0
        if ahead and min(ahead) > 0 and phase > rule.threshold:
            beta = gate * math.exp(rule.beta * math.tanh(math.fsum(ahead) / len(ahead)))
        for name, value in [
            ("beta", beta), ("growth", growth), ("phase", phase), ("ratio", ratio),
            ("history", row), ("steps", steps), ("redundancy", last), ("average", average),
            ("weight", weight),
        ]:  # fmt: skip
            getattr(out, name).append(value)
    return out


def state_of(count: int, window: int) -> RedundancyState:
    """Half of the modalities have had enough steps for a growth; all numbers are positive."""
    history = torch.rand(count, window + 1, dtype=torch.float64) + 0.05
    steps = torch.randint(window - 2, window + 3, (count,)).clamp(min=0)
    last, average, weight = torch.rand(3, count, dtype=torch.float64) + 0.1
    return RedundancyState(history, steps, last, average, weight)


def statistics(owner: list[int], dtype: torch.dtype) -> GradStats:
    count = len(owner)
    numel = torch.randint(1, 4000, (count,))
    mean, m2, dot = torch.randn(count), torch.rand(count) * 50, torch.randn(count) * 9
    return GradStats(numel, *(x.to(dtype) for x in (mean, m2, dot, m2)))


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on(device: str, values: Any) -> Any:
    return type(values)(*(None if x is None else x.to(device) for x in values))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", [
    RedundancyRule(),
    RedundancyRule(threshold=-1e3, unbiased=False),
    RedundancyRule(0.5, 0.2, 0.3, -1e3, by_encoder=True),
])  # fmt: skip
@pytest.mark.parametrize("monitored", [True, False], ids=["monitored", "between"])
@pytest.mark.parametrize("table", [False, True], ids=["scores", "table"])
@pytest.mark.parametrize(
    ("count", "tensors", "window", "dtype", "of_stats"),
    [
        (2, 16, 10, torch.float32, torch.float32),
        (3, 0, 1, torch.float64, torch.float32),
        (5, 137, 4, torch.float32, torch.float64),
        (37, 9, 3, torch.float64, None),
        (137, 3, 2, torch.float64, torch.float64),
    ],
)
def test_parity(
    cell: Cell,
    count: int,
    tensors: int,
    window: int,
    dtype: torch.dtype,
    of_stats: torch.dtype | None,
    table: bool,
    monitored: bool,
    rule: RedundancyRule,
) -> None:
    cell.skip_slow(count > 5 or (table and rule.unbiased))
    s = (torch.rand((count, count) if table else (count,)) + 0.1).to(dtype)
    s[count // 2] += 1.5  # it is ahead of all
    if table and count > 2:
        s[0, count // 2] = NAN  # 0 and the first share nothing
    red = torch.rand(count).to(dtype) + 0.1 if monitored else None
    gate, state = torch.tensor(1.0, dtype=dtype), state_of(count, window)
    owner = torch.randint(0, count, (tensors,)).tolist()
    owner[: len(owner) // 2] = [count // 2] * (len(owner) // 2)
    stats = None if of_stats is None else statistics(owner, of_stats)
    device = cell.device
    found = ops.redundancy_pull(
        s.to(device),
        None if red is None else red.to(device),
        gate.to(device),
        on(device, state),
        rule,
        owner=owner,
        stats=None if stats is None else on(device, stats),
        backend=cell.backend,
    )
    wide = s.double() if table else s.double().unsqueeze(1).expand(count, count)
    want = expected(wide, red, 1.0, state, rule)
    assert rule.threshold > 0 or max(want.beta) > 0
    assert found.coefficients.dtype == dtype
    beta, growth, ratio = double(want.beta), double(want.growth), double(want.ratio)
    bounds = {
        "growth": tolerances.gain_growth(window, growth),
        "phase": tolerances.redundancy_phase(window, rule.gamma, ratio, growth),
    }
    for name, bound in bounds.items():
        tolerances.assert_within(getattr(found, name), double(getattr(want, name)), bound, name)
    bound = tolerances.strength(dtype, count, rule.beta, beta)
    tolerances.assert_within(found.coefficients, beta, bound, "coefficients")
    assert found.state.history.tolist() == want.history
    assert found.state.steps.tolist() == want.steps
    assert found.state.redundancy.tolist() == want.redundancy
    for name in ("average", "weight"):  # a product and a sum of positive numbers
        exact = double(getattr(want, name))
        bound = 6 * tolerances.UNIT_ROUNDOFF[torch.float64] * exact
        tolerances.assert_within(getattr(found.state, name), exact, bound, name)
    if stats is None or of_stats is None:
        assert found.scale.shape == found.pull.shape == (0,)
        return
    assert found.scale.dtype == found.pull.dtype == of_stats
    assert torch.equal(found.pull, found.coefficients[owner].to(of_stats))
    dots, squares = stats.dot.double(), stats.m2.double() + stats.mean.double() ** 2 * stats.numel
    sizes = dots.abs()
    if rule.by_encoder and owner:
        each = torch.tensor(owner)
        same = (each.unsqueeze(1) == each).double()
        dots, squares, sizes = same @ dots, same @ squares, same @ sizes
    pull = found.pull.cpu().double()
    scale = torch.where(pull == 0, 1.0, 1 - pull * dots / (squares + EPS))
    magnitude = sizes / (squares + EPS)
    bound = tolerances.orthogonal_scale(of_stats, tensors, pull, magnitude, scale)
    tolerances.assert_within(found.scale, scale, bound, "scale")


def one(
    cell: Cell, scores: list[Any], red: list[float] | None = None, gate: float = 1.0, **more: Any
) -> ops.RedundancyPull:
    """A pull with a state of ones, and a threshold under every phase."""
    count, device = len(scores), cell.device
    ones = [torch.ones(count, dtype=torch.float64, device=device) for _ in range(3)]
    history = torch.full((count, 3), 0.25, dtype=torch.float64, device=device)
    steps = torch.zeros(count, dtype=torch.int64, device=device)
    return ops.redundancy_pull(
        torch.tensor(scores, device=device),
        None if red is None else torch.tensor(red, device=device),
        torch.tensor(gate, device=device),
        RedundancyState(history, steps, *ones),
        more.pop("rule", RedundancyRule(threshold=-1e9)),
        backend=cell.backend,
        **more,
    )


def test_only_who_is_ahead_of_all_is_regulated(cell: Cell) -> None:
    strength = math.exp(0.9 * math.tanh(0.5 - 0.25))
    beta = one(cell, [0.25, 0.5, 0.25]).coefficients.tolist()
    assert beta == pytest.approx([0.0, strength, 0.0], rel=1e-6) and beta[0] == beta[2] == 0
    assert one(cell, [0.5, 0.5, 0.25]).coefficients.tolist() == [0.0, 0.0, 0.0]
    assert one(cell, [0.25, 0.5, 0.25], gate=0.0).coefficients.tolist() == [0.0, 0.0, 0.0]
    high = RedundancyRule(threshold=0.41)  # the phase is 1 − 0.6·1
    assert one(cell, [0.25, 0.5, 0.25], rule=high).coefficients.tolist() == [0.0, 0.0, 0.0]


def test_numbers_that_are_not_finite_enter_nothing(cell: Cell) -> None:
    found = one(cell, [NAN, 0.5, INF], [0.5, NAN, 0.5])
    assert found.coefficients.tolist() == [0.0, 0.0, 0.0], "NaN is comparable with none"
    assert found.state.steps.tolist() == [0, 1, 0]
    assert found.state.history[:, -1].tolist() == [0.25, 0.5, 0.25]
    last = found.state.redundancy.tolist()
    assert last[0] == last[2] == 1.0 and math.isnan(last[1])
    average = found.state.average.tolist()
    assert average[1] == 1.0 and average[0] == average[2] == pytest.approx(0.95)
    assert found.phase.isnan().tolist() == [False, True, False]


def test_a_pair_without_a_shared_sample_is_not_compared(cell: Cell) -> None:
    table = [[0.5, 0.5, NAN], [0.25, 0.3, NAN], [NAN, NAN, NAN]]
    found = one(cell, table, [0.5, 0.5, NAN])
    assert found.coefficients.tolist() == pytest.approx([math.exp(0.9 * math.tanh(0.25)), 0, 0])
    assert found.state.steps.tolist() == [1, 1, 0]
    assert found.state.redundancy.tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("by_encoder", [False, True])
def test_where_nothing_is_pulled_the_gradient_stays(cell: Cell, by_encoder: bool) -> None:
    """The statistics may not be finite; a NaN stays within its encoder."""
    device = cell.device
    bad = torch.tensor([1.0, NAN, INF, 1.0], device=device)
    stats = GradStats(torch.arange(1, 5, device=device), bad, bad, bad, bad)
    rule = RedundancyRule(threshold=-1e9, by_encoder=by_encoder)
    found = one(cell, [0.5, 0.25], owner=[0, 1, 1, 0], stats=stats, rule=rule)
    beta = found.coefficients.tolist()[0]
    assert found.pull.tolist() == [beta, 0.0, 0.0, beta] and beta > 1
    scale = found.scale.tolist()
    assert scale[1:3] == [1.0, 1.0]
    squares = [1.0 + 1.0, 1.0 + 4.0]
    shares = [2.0 / sum(squares)] * 2 if by_encoder else [1 / square for square in squares]
    assert [scale[0], scale[3]] == pytest.approx([1 - beta * c for c in shares], rel=1e-6)


def test_compiled_in_one_graph(cell: Cell) -> None:
    state = on(cell.device, state_of(2, 3))
    stats = on(cell.device, statistics([1, 0, 0], torch.float32))
    gate = torch.ones((), device=cell.device)

    def step(scores: Tensor, state: RedundancyState) -> tuple[Tensor, ...]:
        found = ops.redundancy_pull(
            scores, scores, gate, state, owner=[1, 0, 0], stats=stats, backend=cell.backend
        )
        return (*found[:3], *found.state, found.scale, found.pull)

    scores = torch.tensor([0.5, 0.25], device=cell.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(scores, state), step(scores, state), strict=True):
        assert torch.equal(a, b)


_STATE = RedundancyState(
    torch.ones(2, 3, dtype=torch.float64),
    torch.ones(2, dtype=torch.int64),
    *(torch.ones(2, dtype=torch.float64) for _ in range(3)),
)
_STATS = GradStats(torch.ones(2).long(), *(torch.ones(2) for _ in range(4)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scores": torch.ones(1)}, ValueError, "with M >= 2"),
        ({"scores": torch.ones(2).half()}, TypeError, "scores must be a float32 or float64"),
        ({"redundancy": torch.ones(3)}, ValueError, r"redundancy must have shape \[2\], got \[3\]"),
        ({"redundancy": torch.ones(2).long()}, TypeError, "redundancy must be a float32"),
        ({"gate": torch.ones(2)}, ValueError, r"gate must have shape \[\], got \[2\]"),
        (
            {"state": _STATE._replace(history=torch.ones(2, 1).double())},
            ValueError,
            r"state.history must have shape \[M, W \+ 1\] with W >= 1, got \[2, 1\]",
        ),
        (
            {"state": _STATE._replace(average=torch.ones(2))},
            TypeError,
            "state.average must be a tensor of torch.float64",
        ),
        (
            {"state": _STATE._replace(steps=torch.ones(3).long())},
            ValueError,
            r"state.steps must have shape \[2\], got \[3\]",
        ),
        ({"rule": RedundancyRule(momentum=1.0)}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"rule": RedundancyRule(beta=-1.0)}, ValueError, "beta must be a finite number"),
        ({"rule": RedundancyRule(gamma=NAN)}, ValueError, "gamma must be a number, got nan"),
        ({"owner": [0, 2]}, ValueError, r"owner\[1\] = 2 is none of the 2 modalities"),
        ({"owner": [0], "stats": _STATS}, ValueError, r"stats.numel must have shape \[1\]"),
        (
            {"owner": [0, 1], "stats": _STATS._replace(dot=None)},
            TypeError,
            "stats must have displacements",
        ),
        (
            {"owner": [0, 1], "stats": _STATS._replace(m2=torch.ones(2).to("meta"))},
            ValueError,
            "stats.m2 is on meta, scores on cpu",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {
        "scores": torch.ones(2),
        "redundancy": None,
        "gate": torch.ones(()),
        "state": _STATE,
        **change,
    }
    with pytest.raises(error, match=match):
        ops.redundancy_pull(**given)
