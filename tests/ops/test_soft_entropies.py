"""soft_entropies: what comes before a soft histogram and after it, and the gradient of it all."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from inputs import wide
from no_sync import no_host_sync
from torch import Tensor

from mmfuse.ops._registry import OPS
from mmfuse.ops.soft_entropies import soft_entropies
from mmfuse.reference.soft_entropies import soft_entropies_backward as reference_backward

WIDE = [torch.float32, torch.float64]
# Problems, samples, bins.
FEW_SIZES = [(1, 1, 2), (2, 33, 3), (3, 70, 30)]
SIZES = [*FEW_SIZES, (5, 257, 64), (1, 70_001, 17), (40, 10, 5), (2, 50, 256)]


def sizes(cell: Cell) -> list[tuple[int, int, int]]:
    return FEW_SIZES if cell.slow else SIZES


def values(
    problems: int, count: int, bins: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Related, away from the bins' centres, where slopes jump, but for the ends of their ranges.

    Either end is there once and, in every other problem, four times.
    """
    found = []
    first = torch.randint(0, bins - 1, (problems, count))
    for shift in (0, 1):
        x = (first + shift * torch.randint(0, bins, (problems, count))) % max(bins - 1, 1)
        x = x + 0.2 + 0.6 * torch.rand(problems, count)
        for k in range(4):
            rows = slice(None, None, 2) if k else slice(None)
            if count > 2 * k + 1:
                x[rows, 2 * k], x[rows, 2 * k + 1] = 0, bins - 1
        found.append(x.to(dtype).to(device))
    return found[0], found[1]


def shares_of(weights: Tensor, samples: int) -> list[Tensor]:
    """The shares of x, y and both, [P, n] in float64."""
    p = weights.double().cpu() / samples
    return [p.sum(2), p.sum(1), p.flatten(1)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_parity(cell: Cell, dtype: torch.dtype) -> None:
    """The ranges are exact, the histogram that of soft_histogram, the entropies those of it."""
    forward = OPS["soft_entropies"].overloads[cell.backend]
    histogram = OPS["soft_histogram"].overloads[cell.backend]
    for problems, count, bins in sizes(cell):
        x, y = values(problems, count, bins, dtype, cell.device)
        if problems > 1:
            x[1] = -3.25
        before = x.clone(), y.clone()
        entropies, weights, *ranges = forward(x, y, bins)
        assert torch.equal(x, before[0]) and torch.equal(y, before[1])
        assert (entropies.dtype, entropies.shape) == (dtype, (problems, 3))
        for v, range_ in zip((x, y), ranges, strict=True):
            constant = v.amin(1) == v.amax(1)
            assert torch.equal(range_[:, 0], v.amin(1))
            assert torch.equal(range_[:, 1], torch.where(constant, v.amin(1) + 1, v.amax(1)))
        if cell != Cell("triton", "cuda"):  # the order of its shares is not fixed
            assert torch.equal(weights, histogram(x, y, *ranges, bins))
        for k, p in enumerate(shares_of(weights, count)):
            expected = torch.special.entr(p).sum(1)
            bound = tolerances.soft_entropy(dtype, p, count)
            tolerances.assert_within(entropies[:, k], expected, bound, f"{k} of {count}, {bins}")


def test_all_cells_alike(cell: Cell) -> None:
    """The terms of H(x, y) are equal, so that they round the same way each time."""
    cell.skip_slow()
    forward = OPS["soft_entropies"].overloads[cell.backend]
    x = torch.arange(256.0).repeat(256).unsqueeze(0)
    y = torch.arange(256.0).repeat_interleave(256).unsqueeze(0)
    entropies, weights, *_ = forward(x.to(cell.device), y.to(cell.device), 256)
    for k, p in enumerate(shares_of(weights, x.shape[1])):
        expected = torch.special.entr(p).sum(1)
        bound = tolerances.soft_entropy(torch.float32, p, x.shape[1])
        tolerances.assert_within(entropies[:, k], expected, bound, f"entropy {k}")


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_gradient_parity(cell: Cell, dtype: torch.dtype) -> None:
    """Against the reference in float64, from the same histogram."""
    forward = OPS["soft_entropies"].overloads[cell.backend]
    backward = OPS["soft_entropies_backward"].overloads[cell.backend]
    for problems, count, bins in sizes(cell):
        x, y = values(problems, count, bins, dtype, cell.device)
        _, weights, *ranges = forward(x, y, bins)
        grad = torch.randn(problems, 3).to(weights)
        actual = backward(grad, x, y, weights, *ranges)
        exact = wide([grad, x, y, weights, *ranges])
        expected = reference_backward(*exact)
        p_x, p_y, p = shares_of(weights, count)
        weight = exact[0].abs()[:, :, None] / count
        slope = tolerances.soft_entropy_slope
        error = slope(dtype, p, weight[:, 2]).view(problems, bins, bins)
        error = error + slope(dtype, p_x, weight[:, 0])[:, :, None]
        error = error + slope(dtype, p_y, weight[:, 1])[:, None]
        largest = 87.4 if dtype == torch.float32 else 708.4
        most = (error + largest * weight.sum(1, True)).flatten(1).amax(1, True)
        # Four cells around a sample, in two differences, each off by the table's own error.
        slopes = tolerances.soft_slopes(dtype, 4 * most, bins) + 4 * error.flatten(1).amax(1, True)
        for k, range_ in enumerate(exact[4:]):
            width = range_[:, 1:] - range_[:, :1]
            bound = tolerances.soft_gradient(dtype, expected[k], slopes, (bins - 1) / width)
            # An end may have all of its range's gradient, of N samples' slopes.
            magnitude = 2 * count * most * (bins - 1)
            end = tolerances.soft_range_gradient(dtype, magnitude, count * slopes, count, bins)
            at_end = (exact[1 + k] == range_[:, :1]) | (exact[1 + k] == range_[:, 1:])
            bound = bound + torch.where(at_end, 2 * end / width, 0.0)
            assert actual[k].dtype == dtype
            tolerances.assert_within(actual[k], expected[k], bound, f"{'xy'[k]}, {count}, {bins}")


def test_the_gradient_is_pytorchs(cell: Cell) -> None:
    """Through the ranges, whose ends share theirs, and of a constant row."""
    x, y = values(3, 40, 9, torch.float64, cell.device)
    x[1] = 4.5

    def formula(x: Tensor, y: Tensor) -> Tensor:
        shares = []
        for v in (x, y):
            low, high = v.amin(1, True), v.amax(1, True)
            high = high + torch.where(low == high, 1.0, 0.0)
            t = (v - low) / (high - low) * 8
            apart = t[:, :, None] - torch.arange(9).to(t)
            shares.append((1 - apart.abs()).clamp(min=0))
        p = torch.einsum("pni,pnj->pij", *shares) / x.shape[1]
        least = torch.finfo(p.dtype).tiny
        parts = [p.sum(2), p.sum(1), p.flatten(1)]
        return torch.stack([-(q * q.clamp(min=least).log()).sum(1) for q in parts], 1)

    weight = torch.randn(3, 3, dtype=torch.float64, device=cell.device)
    weight[1] = 0
    gradients = []
    for function in (lambda a, b: soft_entropies(a, b, 9, cell.backend), formula):
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        (weight * function(*leaves)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_ends_share_in_equal_parts(cell: Cell) -> None:
    """If several samples have the value at an end, each has the same gradient."""
    x = torch.tensor([[0.0, 0.0, 1.3, 2.6, 3.0, 3.0, 3.0]], device=cell.device)
    y = x.flip(1) + torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15, 0.05, 0.35], device=cell.device)
    forward = OPS["soft_entropies"].overloads[cell.backend]
    backward = OPS["soft_entropies_backward"].overloads[cell.backend]
    histogram = OPS["soft_histogram_backward"].overloads[cell.backend]
    _, weights, *ranges = forward(x, y, 4)
    grad = torch.tensor([[0.7, -0.4, 1.1]], device=cell.device)
    found = backward(grad, x, y, weights, *ranges)[0]
    slopes = torch.autograd.functional.jacobian(_entropies_of_table, weights.double().cpu() / 7)
    table = torch.einsum("pk,pkqij->qij", grad.double().cpu(), slopes) / 7
    plain, _, of_range, _ = histogram(table.float().to(cell.device), x, y, *ranges, 4)
    added = (found - plain)[0]
    for place, end, count in (([0, 1], 0, 2), ([4, 5, 6], 1, 3)):
        expected = float(of_range[0, end]) / count
        assert added[place].tolist() == pytest.approx([expected] * count, rel=1e-4, abs=1e-6)
    assert added[2:4].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def _entropies_of_table(p: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).tiny
    parts = [p.sum(2), p.sum(1), p.flatten(1)]
    return torch.stack([-(q * q.clamp(min=least).log()).sum(1) for q in parts], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_non_finite_stays_in_its_problem(cell: Cell, bad: float) -> None:
    x, y = values(3, 33, 6, torch.float32, cell.device)
    clean = soft_entropies(x, y, 6, cell.backend)
    x[1, 20] = bad
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    found = soft_entropies(*leaves, 6, cell.backend)
    assert found.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(found[0::2], clean[0::2], rtol=1e-6, atol=1e-6)
    found[0::2].sum().backward()
    assert bool(leaves[0].grad[0::2].isfinite().all()) and bool(leaves[0].grad[0].any())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_range_without_a_width_in_the_dtype(cell: Cell, masked: bool) -> None:
    """Its entropies are NaN, and so is the gradient of a value between its ends."""
    x = torch.tensor([[-3e38, 0.0, 3e38], [-1.0, 0.0, 1.0]], device=cell.device)
    data = x, x.flip(1)
    present = torch.ones_like(x, dtype=torch.bool) if masked else None
    forward = OPS["soft_entropies"].overloads[cell.backend]
    backward = OPS["soft_entropies_backward"].overloads[cell.backend]
    entropies, *known = forward(*data, 4, present)
    assert entropies.isnan().all(1).tolist() == [True, False]
    found = backward(torch.ones_like(entropies), *data, *known, present)
    for grad in found:
        assert grad.isnan().all(1).tolist() == [True, False]
        assert bool(grad[1].isfinite().all())


@ON_THE_CPU
@pytest.mark.parametrize("shape", [(1, 200_001), (300, 170)], ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, shape: tuple[int, int]) -> None:
    x, y = values(*shape, 7, torch.float32, cell.device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [v.clone().requires_grad_() for v in (x, y)]
            found = soft_entropies(*leaves, 7, cell.backend)
            results.append((found.detach(), *torch.autograd.grad(found.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_host_sync(cell: Cell) -> None:
    x, y = (v.requires_grad_() for v in values(2, 50, 5, torch.float32, cell.device))
    soft_entropies(x, y, 5, cell.backend).sum().backward()  # compiled before
    with no_host_sync(cell.device):
        soft_entropies(x, y, 5, cell.backend).square().sum().backward()
    assert bool(x.grad.count_nonzero())


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_bad_input_of_the_overloads(backend: str) -> None:
    op = OPS["soft_entropies"]
    if op.why_missing(backend, "cpu") is not None:
        pytest.skip(f"no {backend} backend for tensors on the CPU")
    forward, x = op.overloads[backend], torch.rand(2, 5)
    for arguments, match in [
        ((x, x[:, :4].contiguous(), 5), "of one shape"),
        ((x.half(), x.half(), 5), "both float32 or both float64"),
        ((x, x.double(), 5), "both float32 or both float64"),
        ((x.T, x.T, 5), "must be contiguous"),
        ((x, x, 1), "bins must be from 2 to 256"),
        ((x, x, 257), "bins must be from 2 to 256"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            forward(*arguments)
