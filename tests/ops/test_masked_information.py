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
from mmfuse.ops._registry import OPS

NAN = float("nan")
SIZES = [(0,), (7, 0, 3)]  # how many values are missing, problem by problem
MEASURES: dict[str, tuple[int, Callable[..., Any]]] = {
    "mutual": (2, lambda *v, **k: ops.mutual_information(*v, 6, **k)),
    "soft": (2, lambda *v, **k: ops.mutual_information(*v, 6, "soft", **k)),
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
        # The counts are the same, added up in another order.
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


@pytest.mark.parametrize("layout", ["transposed", "every other"])
def test_a_mask_may_have_any_layout(cell: Cell, layout: str) -> None:
    x, mask = [torch.randn(5, 5, device=cell.device) for _ in range(3)], torch.rand(5, 5) > 0.3
    mask = mask.to(cell.device)
    other = mask.t().contiguous().t()
    if layout == "every other":
        other = mask.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(mask, other) and not other.is_contiguous()
    for order, measure in MEASURES.values():
        found, expected = (
            measure(*x[:order], present=m, backend=cell.backend) for m in (other, mask)
        )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


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
    with pytest.raises(TypeError, match=r"present must be dense, got torch\.sparse_coo"):
        measure(*x, present=torch.ones(8, dtype=torch.bool).to_sparse())
    with pytest.raises(ValueError, match=r"present must be like the values, \[8\] on cpu"):
        measure(*x, present=torch.ones(1, 8, dtype=torch.bool))


# Four kinds of problems: all there, 30 % missing, one left, none left.
SOME, ONE, NONE = 1, 2, 3
LEFT_OUT = (0, 12, 39, 40)


def soft(cell: Cell, x: Tensor, y: Tensor, present: Tensor | None = None) -> list[Tensor]:
    """All four numbers, and the gradients of the information and of its share."""
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    found = ops.mutual_information(*leaves, 5, "soft", present=present, backend=cell.backend)
    whole = found.mi + 0.5 * found.nmi
    return [v.detach() for v in found] + list(torch.autograd.grad(whole.sum(), leaves))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_soft_information_and_its_gradient_know_the_pairs_that_are_there(
    cell: Cell, dtype: torch.dtype
) -> None:
    (x, y, _), present = data(cell, LEFT_OUT, dtype=dtype)
    found = soft(cell, x, y, present)
    # The same shares, added up in another order; gradients are sums over all samples.
    wide = dtype == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-10} if wide else {"rtol": 1e-4, "atol": 2e-5}
    if dtype == torch.bfloat16:
        close["rtol"] = 2**-7  # as both are stored
    for p in range(NONE):
        there = present[p]
        want = soft(cell, x[p, there], y[p, there])
        for a, b in zip(found[:4], want[:4], strict=True):
            torch.testing.assert_close(a[p], b, **close)
        for a, b in zip(found[4:], want[4:], strict=True):
            assert bool(b.isfinite().all()) and bool(b.any()) == (p != ONE)
            torch.testing.assert_close(a[p, there], b, **close)
            assert a[p, ~there].tolist() == [0.0] * LEFT_OUT[p]
    assert all(bool(field[NONE].isnan()) for field in found[:4])
    assert all(grad[NONE].tolist() == [0.0] * 40 for grad in found[4:])


@pytest.mark.parametrize("count", [40, 70_001])
def test_soft_entropies_of_some_samples_are_the_references(cell: Cell, count: int) -> None:
    """The ranges to the bit; of long rows the first part has nothing that counts."""
    if cell.slow and count > 40:
        pytest.skip("Triton's interpreter takes a minute for it")
    missing = (count // 3, count, 0)
    (x, y, _), present = data(cell, missing, count)
    if count > 40:
        present[0, :33_000] = False
        x[~present], y[~present] = NAN, float("inf")
    name = "soft_entropies"
    found = OPS[name].overloads[cell.backend](x, y, 6, present)
    inputs = [v.cpu() for v in (x, y)]
    want = OPS[name].overloads["reference"](*inputs, 6, present.cpu())
    grad = torch.randn(3, 3)
    found += OPS[f"{name}_backward"].overloads[cell.backend](grad.to(x), x, y, *found[1:], present)
    wide = [v.double() for v in (grad, *inputs, *(v.cpu() for v in found[1:4]))]
    want += OPS[f"{name}_backward"].overloads["reference"](*wide, present.cpu())
    for end in (2, 3):
        assert torch.equal(found[end].cpu().nan_to_num(7.0), want[end].nan_to_num(7.0))
        assert found[end].isnan().all(1).tolist() == [False, True, False]
    for a, b, atol in zip(found, want, (1e-5, 2e-2, 0, 0, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), rtol=1e-4, atol=atol, equal_nan=True)
    for a in found[4:]:
        assert int(a.cpu()[~present.cpu()].count_nonzero()) == 0 and bool(a[0].any())


def test_soft_gradients_are_those_of_differences(cell: Cell) -> None:
    """Samples that are left out have one too, of 0."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.rand(2, 2, 9, dtype=torch.float64, generator=generator).to(cell.device)
    present = torch.ones(2, 9, dtype=torch.bool, device=cell.device)
    present[0, 1::3], present[1, 0] = False, False
    x, y = (torch.where(present, v, 7.0).requires_grad_() for v in (x, y))
    assert torch.autograd.gradcheck(
        lambda a, b: ops.mutual_information(a, b, 3, "soft", present=present, backend=cell.backend)[
            :3
        ],
        (x, y),
        raise_exception=True,
    )


@pytest.mark.parametrize("count", [2, 3])
def test_a_modality_that_is_gone_leaves_the_other_pairs_alone(cell: Cell, count: int) -> None:
    """The last of M modalities is absent, the others miss 30 %, and one row is absent too."""
    rows, present = data(cell, (12,) * count)
    z = [torch.where(present[m], rows[0][m].nan_to_num(0.5, 0.5) + m, NAN) for m in range(count)]
    present[-1], present[:, 5] = False, False
    for a in range(count):
        for b in range(a):
            both = present[a] & present[b]
            leaves = [v.clone().requires_grad_() for v in (z[a], z[b])]
            mi = ops.mutual_information(*leaves, 4, "soft", present=both, backend=cell.backend).mi
            assert bool(mi.isnan()) == (a == count - 1)
            for grad in torch.autograd.grad(mi, leaves):
                assert bool(grad.isfinite().all()) and not grad[~both].any()
                assert bool(grad.any()) == (a != count - 1)


def test_soft_masks_do_not_sync_and_go_into_graphs(cell: Cell) -> None:
    (x, y, _), present = data(cell, (12, 40))
    soft(cell, x, y, present)
    with no_host_sync(cell.device):
        found = soft(cell, x, y, present)
    assert bool(found[0][0].isfinite())
    function = torch.compile(soft_sum, fullgraph=True, backend="aot_eager")
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    grads = torch.autograd.grad(function(*leaves, present, cell.backend), leaves)
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    want = torch.autograd.grad(soft_sum(*leaves, present, cell.backend), leaves)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.isfinite().all()) and bool(a[0].any())


def soft_sum(x: Tensor, y: Tensor, present: Tensor, backend: str) -> Tensor:
    return ops.mutual_information(x, y, 5, "soft", present=present, backend=backend).mi.nansum()
