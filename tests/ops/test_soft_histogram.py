"""soft_histogram: shares of triangular bins, and the gradient they have."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from inputs import DTYPES, strided, wide
from no_sync import no_host_sync
from torch import Tensor

from mmfuse import ops
from mmfuse.reference.soft_histogram import soft_histogram as reference
from mmfuse.reference.soft_histogram import soft_histogram_backward as reference_backward

INF, NAN = float("inf"), float("nan")

# Problems, samples, bins.
FEW_SIZES = [(1, 1, 2), (2, 33, 3), (3, 200, 30)]
SIZES = [*FEW_SIZES, (5, 257, 64), (1, 3001, 17), (40, 10, 5), (2, 50, 256)]


def ranges(x: Tensor) -> Tensor:
    """Ranges as the op forms them: in the accumulator's precision, constants in the first bin."""
    x = x.detach().to(tolerances.accumulation_dtype(x.dtype))
    width = torch.where(x.amin(1) == x.amax(1), 1.0, 0.0).to(x.dtype)
    return torch.stack([x.amin(1), x.amax(1) + width], dim=1)


def positions(x: Tensor, range_: Tensor, bins: int) -> Tensor:
    """[P, N] in float64: at which bin's centre a value lies, or between which."""
    low, high = range_.unsqueeze(-1).unbind(1)
    return (x - low) / (high - low) * (bins - 1)


def shares(t: Tensor, bins: int) -> Tensor:
    """[P, N, bins], the formula of the docstring."""
    return (1 - (t[:, :, None] - torch.arange(bins).to(t)).abs()).clamp(min=0)


class Exact(NamedTuple):
    x: Tensor
    y: Tensor
    x_range: Tensor
    y_range: Tensor
    t: tuple[Tensor, Tensor]


def exact(x: Tensor, y: Tensor, bins: int) -> Exact:
    x64, y64, x_range, y_range = wide([x, y, ranges(x), ranges(y)])
    t = positions(x64, x_range, bins), positions(y64, y_range, bins)
    return Exact(x64, y64, x_range, y_range, t)


def pairs(
    problems: int, count: int, dtype: torch.dtype, device: str, bins: int, *, kinks: bool = True
) -> tuple[Tensor, Tensor]:
    """Values that are related, and near a bin's centre only with kinks.

    There rounding could put one on the other side, where the slope is another.
    """
    x = torch.randn(problems, count)
    y = 100 * (x + torch.randn(problems, count)) + 30
    out = []
    for values in (x, y):
        values = values.to(dtype)
        if not kinks:
            t = positions(*wide([values, ranges(values)]), bins)
            margin = 16 * bins * tolerances.UNIT_ROUNDOFF[tolerances.accumulation_dtype(dtype)]
            inner = (t > 0.5) & (t < bins - 1.5)
            near = inner & ((t - t.round()).abs() < margin)
            # The lowest value is at the centre of bin 0 in every arithmetic.
            values = torch.where(near, values.amin(1, True), values)
        out.append(values.to(device))
    return out[0], out[1]


def check(cell: Cell, x: Tensor, y: Tensor, bins: int) -> Tensor:
    before = x.clone(), y.clone()
    counts = ops.soft_histogram(x, y, bins, backend=cell.backend)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "an input was written to"
    dtype = tolerances.accumulation_dtype(x.dtype)
    assert (counts.dtype, counts.device) == (dtype, x.device)
    assert counts.shape == (len(x), bins, bins) and counts.is_contiguous()
    e = exact(x, y, bins)
    expected = torch.einsum("pni,pnj->pij", shares(e.t[0], bins), shares(e.t[1], bins))
    near = [(t[:, :, None] - torch.arange(bins)).abs() < 1.01 for t in e.t]
    reached = torch.einsum("pni,pnj->pij", near[0].double(), near[1].double())
    bound = tolerances.soft_counts(x.dtype, expected, reached, x.shape[1])
    what = f"counts of {tuple(x.shape)}, {bins} bins"
    tolerances.assert_within(counts, expected, bound, what)
    total = wide([counts])[0].sum((1, 2))
    tolerances.assert_within(
        total, torch.full_like(total, x.shape[1]), bound.sum((1, 2)), f"sum of the {what}"
    )
    return counts


def check_gradients(cell: Cell, x: Tensor, y: Tensor, bins: int) -> None:
    """The backward op against the reference in float64, the ranges' gradients included."""
    x_range, y_range = ranges(x), ranges(y)
    grad = torch.randn(len(x), bins, bins).to(x_range)
    backward = getattr(torch.ops.mmfuse.soft_histogram_backward, cell.backend)
    actual = backward(grad, x, y, x_range, y_range, bins)
    e = exact(x, y, bins)
    (c,) = wide([grad])
    expected = reference_backward(c, e.x, e.y, e.x_range, e.y_range, bins)
    lower = [t.clamp(0, bins - 1).long().clamp(max=bins - 2) for t in e.t]
    corners = sum(
        c.abs().flatten(1).gather(1, (lower[0] + di) * bins + lower[1] + dj)
        for di in (0, 1)
        for dj in (0, 1)
    )
    slopes = tolerances.soft_slopes(x.dtype, corners, bins)
    for k, (leaf, range_) in enumerate(((x, e.x_range), (y, e.y_range))):
        what = f"{'xy'[k]}, {tuple(x.shape)}, {bins} bins"
        width = (range_[:, 1:] - range_[:, :1]).double()
        per_unit = (bins - 1) / width
        assert actual[k].dtype == leaf.dtype
        bound = tolerances.soft_gradient(x.dtype, expected[k], slopes, per_unit)
        tolerances.assert_within(actual[k], expected[k], bound, f"gradient of {what}")
        magnitude = (expected[k].abs() / per_unit).sum(1, True) * (bins - 1)
        bound = tolerances.soft_range_gradient(
            x.dtype, magnitude, slopes.sum(1, True), x.shape[1], bins
        )
        bound = (bound / width).expand(len(x), 2)
        assert actual[2 + k].dtype == tolerances.accumulation_dtype(x.dtype)
        tolerances.assert_within(actual[2 + k], expected[2 + k], bound, f"range of {what}")


def sizes(cell: Cell) -> list[tuple[int, int, int]]:
    return FEW_SIZES if cell.slow else SIZES


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cell: Cell, dtype: torch.dtype) -> None:
    for problems, count, bins in sizes(cell):
        check(cell, *pairs(problems, count, dtype, cell.device, bins), bins)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_parity(cell: Cell, dtype: torch.dtype) -> None:
    for problems, count, bins in sizes(cell):
        x, y = pairs(problems, count, dtype, cell.device, bins, kinks=False)
        check_gradients(cell, x, y, bins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows(cell: Cell, dtype: torch.dtype) -> None:
    """Many of equal shares in few cells: where a plain float32 sum would stop growing evenly."""
    count = 5_001 if cell.slow or cell.backend == "reference" else 60_001
    x = torch.rand(1, count).to(dtype).to(cell.device)
    check(cell, x, x.square(), 2)
    check(cell, torch.full_like(x, 0.1), x, 3)


def test_agrees_with_the_reference_in_float64(cell: Cell) -> None:
    x, y = (v.double() for v in pairs(2, 30, torch.float64, cell.device, 7))
    e = exact(x, y, 7)
    expected = reference(e.x, e.y, e.x_range, e.y_range, 7)
    bound = tolerances.soft_counts(torch.float64, expected, torch.full_like(expected, 30), 30)
    tolerances.assert_within(check(cell, x, y, 7), expected, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [2, 9, 17])
def test_values_at_the_centres_count_whole(cell: Cell, dtype: torch.dtype, bins: int) -> None:
    """Powers of two between the bins: every backend's positions are exact."""
    x = torch.randint(0, bins, (3, 100))
    y = torch.randint(0, bins, (3, 100))
    x[:, 0], x[:, 1], y[:, 0], y[:, 1] = 0, bins - 1, bins - 1, 0
    expected = torch.stack([torch.bincount(r, minlength=bins**2) for r in x * bins + y])
    x, y = (v.to(dtype).to(cell.device) for v in (2 * x - 8, y / 4))
    counts = ops.soft_histogram(x, y, bins, backend=cell.backend)
    assert torch.equal(counts.cpu().long().flatten(1), expected)
    assert bool((counts == counts.round()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants(cell: Cell, dtype: torch.dtype) -> None:
    """All in one bin, whatever the number of bins: the entropy of one value is 0."""
    x = torch.full((2, 40), 3.25, dtype=dtype, device=cell.device)
    y = torch.randn(2, 40).to(dtype).to(cell.device)
    for bins in (2, 3, 8):
        check(cell, x, y, bins)
        assert check(cell, x, x, bins)[:, 0, 0].tolist() == [40.0] * 2
        found = ops.mutual_information(x, y, bins, "soft", backend=cell.backend)
        # A row of y sums up to 40 but for the rounding of its 40 shares; -p log p of 1 - e is e.
        bound = 40 * 2 * tolerances.UNIT_ROUNDOFF[torch.float32]
        assert found.mi.abs().max() <= bound and found.h_x.abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_non_finite_stays_in_its_problem(cell: Cell, dtype: torch.dtype, value: float) -> None:
    x, y = pairs(4, 33, dtype, cell.device, 6, kinks=False)
    clean = ops.soft_histogram(x, y, 6, backend=cell.backend)
    x[1, 0] = value
    y[3, 32] = value
    counts = ops.soft_histogram(x, y, 6, backend=cell.backend)
    assert counts.isnan().all(2).all(1).tolist() == [False, True, False, True]
    torch.testing.assert_close(counts[0::2], clean[0::2], rtol=1e-6, atol=1e-6)
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    found = ops.soft_histogram(*leaves, 6, backend=cell.backend)
    found[0::2].square().sum().backward()
    for leaf in leaves:
        assert leaf.grad[0::2].isfinite().all()
        assert bool(leaf.grad[0].count_nonzero())


def test_a_range_that_overflows(cell: Cell) -> None:
    x, y = pairs(2, 33, torch.float32, cell.device, 6)
    x[1, 4], x[1, 5] = 3e38, -3e38
    counts = ops.soft_histogram(x, y, 6, backend=cell.backend)
    assert counts.isnan().all(2).all(1).tolist() == [False, True]


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e15, 1e37], ids=str)
def test_extreme_magnitudes(cell: Cell, size: float) -> None:
    x, y = pairs(2, 65, torch.float64, cell.device, 8, kinks=False)
    x = (size * x).float()
    y = y.float()
    check(cell, x, y, 8)
    check(cell, y, x, 8)
    counts = ops.soft_histogram(x, x, 8, backend=cell.backend)
    assert bool(counts.isfinite().all())


@pytest.mark.parametrize("view", list(strided("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    check(cell, *strided(cell.device)[view], 6)


def test_the_gradient_is_pytorchs(cell: Cell) -> None:
    """Through the ranges too, from the formula of the docstring."""
    x, y = pairs(3, 40, torch.float64, cell.device, 9, kinks=False)
    weight = torch.randn(3, 9, 9, dtype=torch.float64, device=cell.device)

    def formula(x: Tensor, y: Tensor) -> Tensor:
        ends = [torch.stack([v.amin(1), v.amax(1)], 1) for v in (x, y)]
        weights = [shares(positions(v, r, 9), 9) for v, r in zip((x, y), ends, strict=True)]
        return torch.einsum("pni,pnj->pij", *weights)

    gradients = []
    for function in (lambda a, b: ops.soft_histogram(a, b, 9, backend=cell.backend), formula):
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        (weight * function(*leaves)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    e = exact(x, y, 9)
    slopes = tolerances.soft_slopes(torch.float64, 4 * weight.abs().amax().cpu(), 9)
    for k, range_ in enumerate((e.x_range, e.y_range)):
        per_unit = 8 / (range_[:, 1:] - range_[:, :1])
        expected = gradients[1][k].cpu()
        # The ends get the sum of all slopes, times at most t = bins - 1, over the width.
        bound = tolerances.soft_gradient(torch.float64, expected, 2 * 40 * slopes, per_unit)
        tolerances.assert_within(gradients[0][k], expected, 2 * bound, "xy"[k])


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.parametrize("used", ["xy", "x", "y"])
def test_gradcheck(cell: Cell, used: str) -> None:
    # Off the centres, by more than gradcheck's step.
    base = torch.tensor([[0.0, 1.37, 2.61, 5.43, 7.0], [7.0, 0.23, 4.4, 0.0, 6.6]])
    base = base[: 1 if cell.slow else 2]
    leaves = [base.double(), base.flip(1).double() * 2 - 3]
    leaves = [
        v.to(cell.device).requires_grad_(n in used) for n, v in zip("xy", leaves, strict=True)
    ]
    for bins in (4,) if cell.slow else (2, 8):
        assert torch.autograd.gradcheck(
            partial(ops.soft_histogram, bins=bins, backend=cell.backend), leaves
        )


def test_gradcheck_of_the_ranges(cell: Cell) -> None:
    overload = getattr(torch.ops.mmfuse.soft_histogram, cell.backend)
    x = torch.tensor([[0.3, 1.37, 2.61, 5.43]], dtype=torch.float64, device=cell.device)
    y = x.flip(1) - 1
    leaves = [x, y, torch.tensor([[0.0, 7.0]]).to(x), torch.tensor([[-1.2, 6.0]]).to(x)]
    leaves = [v.clone().requires_grad_() for v in leaves]
    assert torch.autograd.gradcheck(lambda *v: overload(*v, 6), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_again(cell: Cell, dtype: torch.dtype) -> None:
    if cell == Cell("triton", "cuda"):
        pytest.skip("on GPUs the order of Triton's shares is not fixed")
    x, y = pairs(2, 300, dtype, cell.device, 7)
    one, other = (ops.soft_histogram(x, y, 7, backend=cell.backend) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("bins", [5, 150], ids=["shared", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_of_samples_does_not_matter_in_cuda(
    cell: Cell, dtype: torch.dtype, bins: int
) -> None:
    """Blocks and threads add in any order on a GPU; the host shim has one, so samples change it.

    A histogram of 150 bins in float64 does not fit in shared memory.
    """
    if cell.backend != "cuda":
        pytest.skip("the others add floating-point numbers")
    for problems, count in ((3, 200), (1, 33_001)):
        x, y = pairs(problems, count, dtype, cell.device, bins)
        order = torch.randperm(count).to(cell.device)
        one = ops.soft_histogram(x, y, bins, backend=cell.backend)
        other = ops.soft_histogram(x[:, order], y[:, order], bins, backend=cell.backend)
        assert torch.equal(one, other)


@ON_THE_CPU
@pytest.mark.parametrize("shape", [(1, 200_001), (3000, 17)], ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, shape: tuple[int, int]) -> None:
    x, y = pairs(*shape, torch.float32, cell.device, 5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [v.clone().requires_grad_() for v in (x, y)]
            counts = ops.soft_histogram(*leaves, 5, backend=cell.backend)
            grads = torch.autograd.grad(counts.square().sum(), leaves)
            results.append((counts.detach(), *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_host_sync(cell: Cell) -> None:
    x, y = (v.requires_grad_() for v in pairs(2, 50, torch.float32, cell.device, 5))
    ops.soft_histogram(x, y, 5, backend=cell.backend).sum().backward()  # compiled before
    with no_host_sync(cell.device):
        ops.soft_histogram(x, y, 5, backend=cell.backend).square().sum().backward()
    assert bool(x.grad.count_nonzero())
