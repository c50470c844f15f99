"""grad_stats: every backend against two-pass formulas in float64."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
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
        w = wide([params[t]])[0]
        w0 = torch.zeros_like(w) if anchors is None else wide([anchors[t]])[0]
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
@pytest.mark.parametrize("lists", [0, 1, 2], ids=["plain", "second", "anchored"])
def test_parity(cell: Cell, dtype: torch.dtype, lists: int) -> None:
    grads = gradients(cell.affordable(SIZES + CHUNK_EDGES), dtype, cell.device)
    check(cell, grads, *(like(grads) for _ in range(lists)))


@pytest.mark.usefixtures("poisoned")
def test_chunk_boundaries(cell: Cell) -> None:
    sizes = cell.affordable([*CHUNK_EDGES, 200_003])
    check(cell, gradients([n for size in sizes for n in (size, 3)], torch.float32, cell.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype) -> None:
    grads, odd = (
        gradients([1, 5, 64, 1027], dtype, cell.device, odd_address=True) for _ in range(2)
    )
    check(cell, grads, like(grads), odd)
    check(cell, grads, odd)
    check(cell, like(grads), odd)


@pytest.mark.usefixtures("poisoned")
def test_mixed_dtypes_in_one_call(cell: Cell) -> None:
    grads = [gradients([n], d, cell.device)[0] for n in (5, 1000) for d in DTYPES]
    check(cell, grads, like(grads), like(grads, torch.bfloat16))
    check(cell, grads, like(grads, torch.bfloat16))


def tensors_to_pair(cell: Cell, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of several chunks, with a rest behind the vectors, and at an address between them."""
    grads = gradients(cell.affordable([0, 7, 1030, 8197, 40_003]), dtype, cell.device)
    return grads + gradients([1027], dtype, cell.device, odd_address=True)


@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_anchors_are_anchors_of_zero(
    cell: Cell, dtype: torch.dtype, param_dtype: torch.dtype
) -> None:
    cell.skip_slow(dtype != param_dtype and torch.float64 in (dtype, param_dtype))
    grads = tensors_to_pair(cell, dtype)
    params = like(grads, param_dtype)
    found = check(cell, grads, params)
    zeros = [torch.zeros_like(w) for w in params]
    expected = ops.grad_stats(grads, params, zeros, backend=cell.backend)
    plain = ops.grad_stats(grads, backend=cell.backend)
    for name in ("mean", "m2", "dot", "disp_sq"):
        a, b = getattr(found, name), getattr(expected, name)
        if cell == Cell("triton", "cuda"):  # its compiler chooses the order of a chunk's sums
            u = torch.finfo(a.dtype).eps
            bound = 4096**0.5 * u * (expected.disp_sq * found.sq_norm).sqrt().max()
            torch.testing.assert_close(a, b, rtol=4096**0.5 * u, atol=float(bound))
        else:
            assert torch.equal(a, b), name
        if name in ("mean", "m2"):  # to the last places: more lists may mean smaller batches
            torch.testing.assert_close(a, getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_non_finite_params_stay_in_their_tensor(cell: Cell, value: float) -> None:
    grads = gradients([1501, 1501, 1501], torch.float32, cell.device)
    params = like(grads)
    clean = ops.grad_stats(grads, params, backend=cell.backend)
    params[1][700] = value
    stats = ops.grad_stats(grads, params, backend=cell.backend)
    assert not bool(stats.dot[1].isfinite())
    assert not bool(stats.disp_sq[1].isfinite())
    for a, b in zip(stats, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(stats.mean, clean.mean)
    assert torch.equal(stats.m2, clean.m2)


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


@pytest.mark.parametrize("size", [4096, 40_000])
@pytest.mark.parametrize("count", [1, 4, 64, 512, 4000])
def test_a_beginning_unlike_the_rest(cell: Cell, count: int, size: int) -> None:
    """No shift by the first elements alone is near the mean."""
    grads = []
    for value in (1.8381, 1.6707, -3e5):
        grads += [torch.zeros(size), torch.zeros(size), torch.randn(size)]
        grads[-3][:count] = value
        grads[-2][size - count :] = value
        grads[-1][:count] += value
    check(cell, [g.to(cell.device) for g in grads])


def test_sizes_that_are_all_the_same(cell: Cell) -> None:
    """Their sums round the same way each time, to which no √L applies; as in Adam's first step."""
    for value in (1.6707, 1.8381, 0.001, 1e-4 / 3):
        signs = [torch.randn(n).sign().to(cell.device) for n in (4096, 8192)]
        grads = [value * s for s in signs]
        zeros = [torch.zeros_like(g) for g in grads]
        params = [1.3333 * s for s in signs]
        check(cell, grads, params)
        check(cell, grads, params, zeros)


@ON_THE_CPU
@pytest.mark.parametrize("share", [2**-4, 2**-2, 1.0])
@pytest.mark.parametrize("size", [70, 3000, 40_000])
def test_the_mean_of_numbers_near_the_largest_one(cell: Cell, share: float, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        value = share * torch.finfo(dtype).max
        grads = [torch.full((size,), value).to(dtype), torch.full((size,), -value).to(dtype)]
        grads += [grads[0] * torch.randn(size).sign().to(dtype)]
        stats = ops.grad_stats(grads, backend=cell.backend)
        exact = wide(grads)
        magnitude = torch.stack([g.abs().mean() for g in exact])
        mean = torch.stack([g.mean() for g in exact])
        tolerances.assert_within(stats.mean, mean, tolerances.mean(torch.float32, magnitude))
        assert stats.m2.tolist() == [0.0, 0.0, float("inf")]


@ON_THE_CPU
def test_sums_of_squares_within_float64s_range(cell: Cell) -> None:
    """One float64 gradient makes all results float64."""
    grads = gradients([5, 70, 3000, 9000], torch.float32, cell.device)
    grads = [1e25 * g for g in grads] + gradients([7], torch.float64, cell.device)
    params = [1e30 * p for p in like(grads)]
    check(cell, grads, params)
    check(cell, grads, params, like(grads))
    check(cell, grads, like(grads), like(grads))


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
    other = torch.randn(grad.shape).to(cell.device)
    check(cell, [grad], [torch.randn_like(grad)], [other])
    check(cell, [grad], [torch.randn_like(grad)])
    check(cell, [grad], [other])
    check(cell, [other], [grad])


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


def test_displacement_is_none_without_params() -> None:
    stats = ops.grad_stats([torch.ones(3)])
    assert stats.dot is None
    assert stats.disp_sq is None
    for anchors in (None, [torch.zeros(3)]):
        displaced = ops.grad_stats([torch.ones(3)], [torch.ones(3)], anchors)
        with pytest.raises(ValueError, match="with and without params"):
            stats.merge(displaced)
        with pytest.raises(ValueError, match="with and without params"):
            displaced.merge(stats)


def test_two_gradients_of_the_same_tensors(cell: Cell) -> None:
    """The Gram matrix of two gradients, in numbers that are exact."""
    g1, g2 = [torch.tensor([1.0, -2.0, 3.0])], [torch.tensor([4.0, 0.5, -1.0])]
    g1, g2 = ([t.to(cell.device) for t in g] for g in (g1, g2))
    stats = ops.grad_stats(g1, g2, backend=cell.backend)
    assert (stats.dot.tolist(), stats.disp_sq.tolist()) == ([0.0], [17.25])
    torch.testing.assert_close(stats.sq_norm, torch.tensor([14.0], device=cell.device))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"grads\[1\] has dtype torch.int64"):
        ops.grad_stats([torch.ones(1), torch.ones(1).long()])
    with pytest.raises(ValueError, match="anchors need params"):
        ops.grad_stats([torch.ones(1)], None, [torch.ones(1)])
    with pytest.raises(ValueError, match="1 grads but 2 params"):
        ops.grad_stats([torch.ones(1)], [torch.ones(1)] * 2)
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch.int64"):
        ops.grad_stats([torch.ones(1)], [torch.ones(1).long()])
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(2,\), its gradient \(1,\)"):
        ops.grad_stats([torch.ones(1)], [torch.ones(2)])
    with pytest.raises(ValueError, match="1 grads but 2 anchors"):
        ops.grad_stats([torch.ones(1)], [torch.ones(1)], [torch.ones(1)] * 2)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(2,\), its gradient \(1,\)"):
        ops.grad_stats([torch.ones(1)], [torch.ones(2)], [torch.ones(1)])
