"""discrepancy_ratios: every backend against the quotients in float64."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import Cell
from samples import BOUNDS

from mmfuse import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 8, 33])
def test_ratios_parity(cell: Cell, dtype: torch.dtype, count: int) -> None:
    s = (torch.rand(count) + 1e-3).to(dtype).to(cell.device)
    rho = ops.discrepancy_ratios(s, backend=cell.backend)
    x = s.cpu().double()
    expected = torch.stack(
        [torch.stack([x[m] / x[j] for j in range(count) if j != m]).mean() for m in range(count)]
    )
    assert rho.dtype == dtype
    (bound,) = BOUNDS["discrepancy_ratios"]((s,), [expected])
    tolerances.assert_within(rho, expected, bound)


def test_ratios_of_two_are_the_cvpr_papers(cell: Cell) -> None:
    s = torch.tensor([0.5, 0.125], device=cell.device)
    assert ops.discrepancy_ratios(s, backend=cell.backend).tolist() == [4.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_equal_scores_have_ratio_1(cell: Cell, dtype: torch.dtype, count: int) -> None:
    """Exactly: OGM and OPM begin to act beyond it."""
    for score in (torch.rand(30) + 1e-3).tolist():
        s = torch.full((count,), score, dtype=dtype, device=cell.device)
        rho = ops.discrepancy_ratios(s, backend=cell.backend)
        assert rho.tolist() == [1.0] * count


def test_ratio_to_a_score_of_zero(cell: Cell) -> None:
    s = torch.tensor([0.5, 0.0, 0.25], device=cell.device)
    rho = ops.discrepancy_ratios(s, backend=cell.backend)
    assert rho.tolist() == [float("inf"), 0.0, float("inf")]


def test_bad_input() -> None:
    for scores, error, match in [
        (torch.ones(1), ValueError, "M >= 2"),
        (torch.ones(2, 2), ValueError, "M >= 2"),
        (torch.ones(2).long(), TypeError, "float32 or float64"),
    ]:
        with pytest.raises(error, match=match):
            ops.discrepancy_ratios(scores)
