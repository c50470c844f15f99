"""grad_stats: every backend against two-pass formulas in float64."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import Cell
from inputs import CHUNK_EDGES, DTYPES, SIZES, gradients, like, strided_views, wide
from torch import Tensor

from mmfuse import ops


def check(
    cell: Cell,
    grads: list[Tensor],
    params: list[Tensor] | None = None,
    anchors: list[Tensor] | None = None,
) -> ops.GradStats:
    stats = ops.grad_stats(grads, params, anchors, backend=cell.backend)
    assert stats.numel.tolist() == [g.numel() for g in grads]
    expected_dtype = (
        torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    )
    assert stats.mean.dtype == stats.m2.dtype == expected_dtype
    for t, (grad, g) in enumerate(zip(grads, wide(grads), strict=True)):
        what = f"tensor {t} of {g.numel()} elements"
        # Each tensor accumulates in its own precision; a float32 result is rounded once more.
        dtype = grad.dtype if expected_dtype == torch.float64 else torch.float32
        mean = g.mean() if g.numel() else g.sum()
        m2 = (g - mean).square().sum()
        magnitude = g.abs().mean() if g.numel() else g.sum()
        tolerances.assert_within(
            stats.mean[t], mean, tolerances.mean(dtype, magnitude), f"mean of {what}"
        )
        tolerances.assert_within(
            stats.m2[t], m2, tolerances.sum_of_products(dtype, m2), f"m2 of {what}"
        )
        if params is None:
            continue
        w, w0 = wide([params[t]])[0], wide([anchors[t]])[0]
        d = w - w0
        spread = w.abs() + w0.abs()
        tolerances.assert_within(
            stats.dot[t],
            (d * g).sum(),
            tolerances.sum_of_products(dtype, (spread * g.abs()).sum()),
            f"dot of {what}",
        )
        tolerances.assert_within(
            stats.disp_sq[t],
            d.square().sum(),
            tolerances.sum_of_products(dtype, (spread * d.abs()).sum()),
            f"disp_sq of {what}",
        )
    return stats


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
def test_parity(cell: Cell, dtype: torch.dtype, anchored: bool) -> None:
    grads = gradients(cell.affordable(SIZES + CHUNK_EDGES), dtype, cell.device)
    check(cell, grads, *([like(grads), like(grads)] if anchored else []))


@pytest.mark.usefixtures("poisoned")
def test_chunk_boundaries(cell: Cell) -> None:
    sizes = cell.affordable([*CHUNK_EDGES, 200_003])
    check(cell, gradients([n for size in sizes for n in (size, 3)], torch.float32, cell.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype) -> None:
    grads = gradients([1, 5, 64, 1027], dtype, cell.device, odd_address=True)
    check(
        cell, grads, like(grads), gradients([1, 5, 64, 1027], dtype, cell.device, odd_address=True)
    )


@pytest.mark.usefixtures("poisoned")
def test_mixed_dtypes_in_one_call(cell: Cell) -> None:
    grads = [gradients([n], d, cell.device)[0] for n in (5, 1000) for d in DTYPES]
    check(cell, grads, like(grads), like(grads, torch.bfloat16))


@pytest.mark.parametrize("size", [1000, 70_001])
def test_a_large_mean_does_not_cancel_the_variance(cell: Cell, size: int) -> None:
    """Mean 1e4 and standard deviation 1e-2: Σg² − n·mean² would lose everything in float32."""
    grad = (1e4 + 1e-2 * torch.randn(size, dtype=torch.float64)).float().to(cell.device)
    stats = check(cell, [grad])
    assert 5e-3 < float(stats.std) < 2e-2


def test_extreme_magnitudes(cell: Cell) -> None:
    """Squares that leave float32's range give 0 or Inf, as they do in PyTorch; the mean stays."""
    tiny = torch.full((3000,), 1e-30) * torch.randn(3000).sign()
    huge = torch.full((3000,), 1e25) * torch.randn(3000).sign()
    stats = ops.grad_stats([tiny.to(cell.device), huge.to(cell.device)], backend=cell.backend)
    assert float(stats.m2[1]) == float("inf")
    assert float(stats.m2[0]) < 1e-37
    tolerances.assert_within(
        stats.mean,
        torch.stack([tiny.double().mean(), huge.double().mean()]),
        tolerances.mean(torch.float32, torch.tensor([1e-30, 1e25], dtype=torch.float64)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", [0, 700, 1500], ids=str)
def test_non_finite_stays_in_its_tensor(
    cell: Cell, dtype: torch.dtype, value: float, where: int
) -> None:
    grads = gradients([1501, 1501, 1501], dtype, cell.device)
    clean = ops.grad_stats(grads, backend=cell.backend)
    grads[1][where] = value
    stats = ops.grad_stats(grads, backend=cell.backend)
    assert not bool(stats.mean[1].isfinite())
    assert bool(stats.m2[1].isnan()) or bool(stats.m2[1].isinf())
    for t in (0, 2):
        assert torch.equal(stats.mean[t], clean.mean[t])
        assert torch.equal(stats.m2[t], clean.m2[t])


@pytest.mark.parametrize("view", list(strided_views("cpu")))
def test_strided_gradients(cell: Cell, view: str) -> None:
    grad = strided_views(cell.device)[view]
    check(cell, [grad], [torch.randn_like(grad)], [torch.randn(grad.shape).to(cell.device)])


def test_no_tensors(cell: Cell) -> None:
    stats = ops.grad_stats([], backend=cell.backend)
    assert stats.numel.shape == stats.mean.shape == stats.m2.shape == (0,)


def test_many_tensors(cell: Cell) -> None:
    count = 100 if cell.slow else 1300
    check(cell, gradients([i % 7 for i in range(count)], torch.float32, cell.device))


def test_same_numbers_for_any_number_of_threads() -> None:
    grads = gradients([300_000, 5, 70_001], torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.grad_stats(grads, like(grads, torch.float32)[:0] or None))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.mean, results[0].mean)
        assert torch.equal(other.m2, results[0].m2)


@pytest.mark.parametrize("split", [0, 1, 7, 500, 1000])
def test_merge_of_two_parts_is_the_whole(cell: Cell, split: int) -> None:
    g, w, w0 = (torch.randn(1000, dtype=torch.float64, device=cell.device) for _ in range(3))
    whole = ops.grad_stats([g], [w], [w0], backend=cell.backend)
    parts = [
        ops.grad_stats([g[s]], [w[s]], [w0[s]], backend=cell.backend)
        for s in (slice(None, split), slice(split, None))
    ]
    merged = parts[0].merge(parts[1])
    assert torch.equal(merged.numel, whole.numel)
    for name in ("mean", "m2", "dot", "disp_sq"):
        # Both sides are float64 sums of 1,000 terms: 1e-12 is 1,000 roundings of 2^-53, and ten.
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )


def test_properties_are_pytorchs() -> None:
    grads = gradients([2, 3, 1000], torch.float64, "cpu")
    stats = ops.grad_stats(grads)
    torch.testing.assert_close(stats.std, torch.stack([g.std() for g in grads]))
    torch.testing.assert_close(stats.sq_norm, torch.stack([g.square().sum() for g in grads]))


def test_std_of_fewer_than_two_elements_is_zero() -> None:
    assert ops.grad_stats([torch.ones(1), torch.ones(0)]).std.tolist() == [0.0, 0.0]


def test_displacement_is_none_without_anchors() -> None:
    stats = ops.grad_stats([torch.ones(3)])
    assert stats.dot is None
    assert stats.disp_sq is None
    anchored = ops.grad_stats([torch.ones(3)], [torch.ones(3)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="with and without anchors"):
        stats.merge(anchored)
    with pytest.raises(ValueError, match="with and without anchors"):
        anchored.merge(stats)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"grads\[1\] has dtype torch.int64"):
        ops.grad_stats([torch.ones(1), torch.ones(1).long()])
    with pytest.raises(ValueError, match="params and anchors go together"):
        ops.grad_stats([torch.ones(1)], [torch.ones(1)])
    with pytest.raises(ValueError, match="1 grads but 2 anchors"):
        ops.grad_stats([torch.ones(1)], [torch.ones(1)], [torch.ones(1)] * 2)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(2,\), its gradient \(1,\)"):
        ops.grad_stats([torch.ones(1)], [torch.ones(2)], [torch.ones(1)])
