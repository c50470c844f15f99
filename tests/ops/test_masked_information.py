"""Histograms and information of the values that are present: as if the others were not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import Cell
from no_sync import no_host_sync
from numpy_bins import related
from torch import Tensor

from mmfuse import ops

NAN = float("nan")
SIZES = [(0,), (7, 0, 3)]  # how many values are missing, problem by problem
MEASURES: dict[str, tuple[int, Callable[..., Any]]] = {
    "mutual": (2, lambda *v, **k: ops.mutual_information(*v, 6, **k)),
    "conditional": (3, lambda *v, **k: ops.conditional_mutual_information(*v, 6, **k)),
    "co": (3, lambda *v, **k: [ops.co_information(*v, 6, **k)]),
}


def data(
    cell: Cell, missing: tuple[int, ...], count: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Three variables, and a mask; what is missing is NaN, infinite, and far away."""
    rows = related((len(missing), count), dtype, cell.device)
    present = torch.ones(len(missing), count, dtype=torch.bool, device=cell.device)
    for p, n in enumerate(missing):
        present[p, torch.randperm(count)[:n].to(cell.device)] = False
    for x, bad in zip(rows, (NAN, float("inf"), 1e4), strict=True):
        x[~present] = bad
    return list(rows), present


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("missing", SIZES)
def test_the_counts_are_those_of_the_values_that_are_there(
    cell: Cell, missing: tuple[int, ...], order: int, dtype: torch.dtype
) -> None:
    rows, present = data(cell, missing, dtype=dtype)
    tuples = [(0, 1), (1, 2)] if order == 2 else [(0, 1, 2)]
    found = ops.joint_entropies(rows, tuples, 5, present=present, backend=cell.backend)
    for p in range(len(missing)):
        there = [x[p : p + 1, present[p]] for x in rows]
        want = ops.joint_entropies(there, tuples, 5, backend=cell.backend)
        assert torch.equal(found.counts[:, p : p + 1], want.counts)
        # Of the same counts, added up in another order.
        torch.testing.assert_close(
            found.entropies[:, p : p + 1], want.entropies, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", MEASURES)
def test_information_is_that_of_the_values_that_are_there(cell: Cell, name: str) -> None:
    order, measure = MEASURES[name]
    rows, present = data(cell, (9,))
    for shape in ((1, -1), (-1,)):
        given = [x.view(shape) for x in rows[:order]]
        found = measure(*given, present=present.view(shape), backend=cell.backend)
        want = measure(*(x[present].view(shape) for x in rows[:order]), backend=cell.backend)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            assert bool(b.isfinite().all())


def test_constants_are_counted_in_their_own_bin(cell: Cell) -> None:
    """NumPy widens their range, so that they are not in the first."""
    x = torch.full((1, 12), 0.7, device=cell.device)
    y = torch.arange(12.0, device=cell.device).view(1, -1)
    present = y < 9
    found = ops.joint_entropies([x, y], [(0, 1)], 3, present=present, backend=cell.backend)
    assert found.counts.tolist() == [[[0, 0, 0, 3, 3, 3, 0, 0, 0]]]


def test_nothing_is_known_where_none_is_there_or_one_is_not_finite(cell: Cell) -> None:
    rows, present = data(cell, (0, 40, 5))
    rows[1][0, 4] = NAN
    found = ops.joint_entropies(rows[:2], [(0, 1)], 4, present=present, backend=cell.backend)
    assert found.counts.sum(-1).tolist() == [[0, 0, 35]]
    assert found.entropies.isnan().all(-1).tolist() == [[True, True, False]]
    mi = ops.mutual_information(*rows[:2], 4, present=present, backend=cell.backend)
    assert all(field.isnan().tolist() == [True, True, False] for field in mi)


def test_no_host_sync(cell: Cell) -> None:
    rows, present = data(cell, (3,))
    ops.joint_entropies(rows, [(0, 1, 2)], 4, present=present, backend=cell.backend)
    with no_host_sync(cell.device):
        found = ops.joint_entropies(rows, [(0, 1, 2)], 4, present=present, backend=cell.backend)
    assert int(found.counts.sum()) == 37


@pytest.mark.parametrize("name", MEASURES)
def test_wrong_masks_are_named(name: str) -> None:
    order, measure = MEASURES[name]
    x = [torch.randn(8) for _ in range(order)]
    with pytest.raises(TypeError, match=r"present must be a bool tensor, got torch\.int64"):
        measure(*x, present=torch.ones(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"present must be like the values, \[8\] on cpu"):
        measure(*x, present=torch.ones(1, 8, dtype=torch.bool))


def test_soft_histograms_take_no_mask() -> None:
    x, present = torch.randn(8), torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match="give 'soft' the pairs that are there"):
        ops.mutual_information(x, x, 4, "soft", present=present)
