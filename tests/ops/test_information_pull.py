"""information_pull: every backend against the paper's formulas in float64, and at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tolerances
import torch
from cells import Cell
from torch import Tensor

from mmfuse import ops

FLOAT = (torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")


def expected(
    s: Tensor, is_open: Tensor, beta: float, multipliers: list[float]
) -> tuple[Tensor, Tensor]:
    """The paper's equations, modality by modality; `s[m][j]` is that of m where j is too."""
    gaps, alphas = [], []
    for m in range(len(s)):
        ahead = [float(s[m][j] - s[j][m]) for j in range(len(s))]
        behind = [x for x in ahead if x > 0]
        gaps.append(math.fsum(behind) / len(behind) if behind else 0.0)
        alpha = multipliers[m] * math.exp(beta * math.tanh(gaps[-1]))
        alphas.append(alpha if is_open[m] and gaps[-1] > 0 else 0.0)
    return torch.tensor(gaps, dtype=torch.float64), torch.tensor(alphas, dtype=torch.float64)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counted", [None, "one", "each"])
@pytest.mark.parametrize("table", [False, True], ids=["scores", "table"])
@pytest.mark.parametrize("dtype", FLOAT, ids=str)
@pytest.mark.parametrize(("count", "tensors"), [(2, 16), (3, 0), (5, 137), (37, 9), (137, 1)])
def test_parity(
    cell: Cell, count: int, tensors: int, dtype: torch.dtype, table: bool, counted: str | None
) -> None:
    cell.skip_slow(count == 137 or (counted == "each" and count != 5))
    s = torch.randn((count, count) if table else (count,)).to(dtype)
    s[1] += 5.0  # it is ahead
    if table and count > 2:
        s[0, 1] = NAN  # 0 and 1 share nothing
    # Powers of two: the products are exact.
    numbers = {None: None, "one": torch.tensor(8.0), "each": torch.full_like(s, 4.0)}[counted]
    is_open = torch.rand(count) > 0.3
    is_open[0], is_open[1] = False, True
    steps = torch.randint(0, 9, (count,))
    multipliers = [] if counted is None else torch.rand(count, dtype=torch.float64).tolist()
    owner = tuple(torch.randint(0, count, (tensors,)).tolist())
    found = ops.information_pull(
        s.to(cell.device),
        is_open.to(cell.device),
        steps.to(cell.device),
        0.7,
        owner=owner,
        count=None if numbers is None else numbers.to(cell.device),
        multipliers=multipliers,
        backend=cell.backend,
    )
    wide = s.double() if numbers is None else s.double() * numbers.double()
    each = wide if table else wide.unsqueeze(1).expand(count, count)
    gap, alpha = expected(each, is_open, 0.7, multipliers or [1.0] * count)
    assert bool((alpha > 0).any() and (alpha == 0).any())
    assert found.gap.dtype == torch.float64 and found.coefficients.dtype == dtype
    tolerances.assert_within(found.gap, gap, tolerances.information_gap(count, gap), "gap")
    bound = tolerances.strength(dtype, count, 0.7, alpha)
    tolerances.assert_within(found.coefficients, alpha, bound, "coefficients")
    assert torch.equal(found.steps.cpu(), steps + 1)
    # The tensors get what their modality has, rounded where it is.
    assert torch.equal(found.pull, found.coefficients[list(owner)])
    assert torch.equal(found.scale, torch.ones_like(found.pull))


def one(
    cell: Cell,
    scores: list[Any],
    is_open: list[bool] | None = None,
    dtype: torch.dtype = torch.float32,
    **more: Tensor,
) -> ops.InformationPull:
    count = len(scores)
    return ops.information_pull(
        torch.tensor(scores, dtype=dtype, device=cell.device),
        torch.tensor(is_open or [True] * count, device=cell.device),
        torch.arange(count, device=cell.device),
        0.9,
        owner=list(range(count)),
        backend=cell.backend,
        **more,
    )


def test_the_gap_by_hand(cell: Cell) -> None:
    assert one(cell, [-1.0, -3.0, -2.0]).gap.tolist() == [1.5, 0.0, 1.0]
    assert one(cell, [-1.0, -1.0]).gap.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("table", [False, True], ids=["scores", "table"])
def test_nobody_is_ahead_of_an_equal(cell: Cell, table: bool) -> None:
    """Three times these numbers is rounded: with the product fused, each would be ahead of itself.

    It holds for the modality itself, and for another one with the same score.
    """
    scores = torch.tensor([0.3, 0.1, 0.7, 0.1], dtype=torch.float64)
    each = scores.unsqueeze(1).expand(4, 4).contiguous() if table else scores
    for count in (torch.tensor(3.0), torch.full_like(each, 3.0)):
        found = one(cell, each.tolist(), dtype=torch.float64, count=count.to(cell.device))
        a, b, c, _ = (scores * 3.0).tolist()
        gaps = [a - b, 0.0, (c - a + 2 * (c - b)) / 3, 0.0]
        assert found.gap.tolist() == pytest.approx(gaps, rel=1e-14, abs=0)
        assert (found.pull == 0).tolist() == [False, True, False, True]


def test_a_closed_window(cell: Cell) -> None:
    found = one(cell, [-1.0, -3.0, -2.0], [False, True, True])
    alpha = found.coefficients.tolist()
    assert alpha[:2] == [0.0, 0.0]
    assert alpha[2] == pytest.approx(math.exp(0.9 * math.tanh(1.0)), rel=1e-6)
    assert found.steps.tolist() == [1, 2, 3]


def test_scores_that_are_not_finite(cell: Cell) -> None:
    """A NaN is ahead of nothing and behind nothing; −∞ is behind by as much as tanh sees."""
    assert one(cell, [-1.0, NAN]).coefficients.tolist() == [0.0, 0.0]
    found = one(cell, [-1.0, -INF])
    assert found.gap.tolist() == [INF, 0.0]
    assert found.coefficients.tolist() == pytest.approx([math.exp(0.9), 0.0], rel=1e-6)
    assert one(cell, [-INF, -INF]).coefficients.tolist() == [0.0, 0.0]


def test_who_is_missing_has_no_step(cell: Cell) -> None:
    table = [[-1.0, -2.0, NAN], [-4.0, -3.0, NAN], [NAN, NAN, NAN]]
    found = one(cell, table)
    assert found.gap.tolist() == [2.0, 0.0, 0.0]
    assert found.steps.tolist() == [1, 2, 2]
    assert found.pull.tolist() == found.coefficients.tolist()
    unknown = torch.tensor(NAN, device=cell.device)
    assert one(cell, table, count=unknown).steps.tolist() == [1, 2, 2]


def test_compiled_in_one_graph(cell: Cell) -> None:
    is_open = torch.tensor([True, True], device=cell.device)
    steps = torch.zeros(2, dtype=torch.int64, device=cell.device)

    def step(scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.information_pull(
                scores,
                is_open,
                steps,
                0.9,
                owner=[1, 0, 0],
                multipliers=[0.95, 0.1],
                backend=cell.backend,
            )
        )

    scores = torch.tensor([-0.5, -1.5], device=cell.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(scores), step(scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scores": torch.ones(1)}, ValueError, r"shape \[M\] or \[M, M\] with M >= 2, got \[1\]"),
        ({"scores": torch.ones(2, 3)}, ValueError, r"got \[2, 3\]"),
        ({"scores": torch.ones(())}, ValueError, r"got \[\]"),
        ({"scores": torch.ones(2).half()}, TypeError, "scores must be a float32 or float64"),
        ({"beta": -1.0}, ValueError, "beta must be a finite number of at least 0, got -1.0"),
        ({"beta": NAN}, ValueError, "beta must be"),
        ({"window_open": torch.ones(2)}, TypeError, "window_open must be a tensor of torch.bool"),
        ({"steps": torch.ones(3).long()}, ValueError, r"steps must have shape \[2\], got \[3\]"),
        ({"steps": torch.ones(2).long().to("meta")}, ValueError, "steps is on meta, scores on cpu"),
        ({"owner": [0, 2]}, ValueError, r"owner\[1\] = 2 is none of the 2 modalities"),
        ({"count": torch.ones(3)}, ValueError, r"count must have shape \[2\], got \[3\]"),
        ({"multipliers": [1.0]}, ValueError, "multipliers must have 2 numbers, got 1"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {
        "scores": torch.ones(2),
        "window_open": torch.ones(2, dtype=torch.bool),
        "steps": torch.zeros(2, dtype=torch.int64),
        "beta": 0.9,
        **change,
    }
    with pytest.raises(error, match=match):
        ops.information_pull(**given)
