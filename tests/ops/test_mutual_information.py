"""Mutual, conditional and co-information: what they must equal, and what they are known to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import tolerances
import torch
from cells import Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES
from no_sync import no_host_sync
from numpy_bins import NUMPY_BINS_IN_FLOAT32, as_numpy, related
from strategies import COMMON, seeds
from torch import Tensor

from mmfuse import ops

NAN = float("nan")
Measure = Callable[..., Any]


def log_ratio(p: numpy.ndarray, q: numpy.ndarray) -> float:
    """Σ p ln(p/q) over the cells that are occupied."""
    some = p > 0
    return float((p[some] * numpy.log(p[some] / numpy.broadcast_to(q, p.shape)[some])).sum())


def numpys_mutual_information(x: Tensor, y: Tensor, bins: int) -> float:
    """The formula of the docstring."""
    p = numpy.histogram2d(as_numpy(x), as_numpy(y), bins)[0] / len(x)
    return log_ratio(p, p.sum(1, keepdims=True) * p.sum(0))


def numpys_conditional(x: Tensor, y: Tensor, z: Tensor, bins: int) -> float:
    """Σ p(x, y, z) ln (p(z) p(x, y, z) / (p(x, z) p(y, z)))."""
    p = numpy.histogramdd([as_numpy(v) for v in (x, y, z)], bins)[0] / len(x)
    x_z, y_z, only_z = p.sum(1, keepdims=True), p.sum(0, keepdims=True), p.sum((0, 1))
    return log_ratio(p, x_z * y_z / numpy.where(only_z > 0, only_z, 1))


def entropy_of(x: Tensor, bins: int) -> float:
    p = numpy.histogram(as_numpy(x), bins)[0] / len(x)
    return -float((p[p > 0] * numpy.log(p[p > 0])).sum())


def near(dtype: torch.dtype, expected: float, count: int, cells: int, terms: int) -> Any:
    """Up to `terms` entropies, each off by its bound on either side; rounded once at the end."""
    bound = terms * float(tolerances.entropy(torch.ones(cells).double() * count / cells))
    stored = tolerances.UNIT_ROUNDOFF[tolerances.accumulation_dtype(dtype)]
    return pytest.approx(expected, rel=0, abs=2 * bound + stored * (abs(expected) + bound))


needs_numpys_float32 = pytest.mark.skipif(
    not NUMPY_BINS_IN_FLOAT32, reason="before NumPy 2 a float32 histogram has float64 edges"
)


@needs_numpys_float32
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [1, 4, 30])
def test_mutual_information_is_numpys(cell: Cell, dtype: torch.dtype, bins: int) -> None:
    for problems, count in ((1, 1), (3, 100)):
        x, y, _ = related((problems, count), dtype, cell.device)
        found = ops.mutual_information(x, y, bins, backend=cell.backend)
        for value in found:
            assert (value.dtype, value.shape) == (tolerances.accumulation_dtype(dtype), (problems,))
            assert value.device == x.device
        for p in range(problems):
            expected = numpys_mutual_information(x[p], y[p], bins)
            assert float(found.mi[p]) == near(dtype, expected, count, bins**2, 3)
            h_x, h_y = entropy_of(x[p], bins), entropy_of(y[p], bins)
            assert float(found.h_x[p]) == near(dtype, h_x, count, bins, 1)
            assert float(found.h_y[p]) == near(dtype, h_y, count, bins, 1)
            ratio = 2 * expected / (h_x + h_y) if h_x + h_y else 0.0
            # The quotient is at most 1; its parts are off by their bounds.
            assert float(found.nmi[p]) == near(dtype, ratio, count, bins**2, 9)


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@needs_numpys_float32
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [1, 4, 11])
def test_conditional_and_co_information_are_numpys(
    cell: Cell, dtype: torch.dtype, bins: int
) -> None:
    for problems, count in ((1, 1), (2, 150)):
        x, y, z = related((problems, count), dtype, cell.device)
        found = ops.conditional_mutual_information(x, y, z, bins, backend=cell.backend)
        shared = ops.co_information(x, y, z, bins, backend=cell.backend)
        for value in (*found, shared):
            assert (value.dtype, value.shape) == (tolerances.accumulation_dtype(dtype), (problems,))
            assert value.device == x.device
        for p in range(problems):
            expected = numpys_conditional(x[p], y[p], z[p], bins)
            cells = bins**3
            assert float(found.cmi[p]) == near(dtype, expected, count, cells, 4)
            pair = numpys_mutual_information(x[p], y[p], bins)
            assert float(shared[p]) == near(dtype, pair - expected, count, cells, 7)
            h_z = entropy_of(z[p], bins)
            for value, other in ((found.h_x_given_z, x), (found.h_y_given_z, y)):
                given = entropy_of(other[p], bins) - numpys_mutual_information(other[p], z[p], bins)
                assert float(value[p]) == near(dtype, given, count, bins**2, 4)
                assert h_z + float(value[p]) >= entropy_of(other[p], bins) - 1e-6
            total = float(found.h_x_given_z[p] + found.h_y_given_z[p])
            assert float(found.ncmi[p]) == pytest.approx(
                2 * float(found.cmi[p]) / total if total else 0.0, rel=1e-5
            )


MEASURES: dict[str, tuple[int, Measure]] = {
    "histogram": (2, lambda *v, **k: ops.mutual_information(*v, 6, **k)),
    "soft": (2, lambda *v, **k: ops.mutual_information(*v, 6, "soft", **k)),
    "conditional": (3, lambda *v, **k: ops.conditional_mutual_information(*v, 6, **k)),
    "co": (3, lambda *v, **k: [ops.co_information(*v, 6, **k)]),
}


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_batch_is_a_loop(cell: Cell, name: str) -> None:
    order, measure = MEASURES[name]
    data = related((4, 50), torch.float32, cell.device)[:order]
    together = measure(*data, backend=cell.backend)
    for p in range(4):
        alone = measure(*(x[p] for x in data), backend=cell.backend)
        for one, other in zip(alone, together, strict=True):
            assert one.shape == ()
            if name == "soft" and cell == Cell(
                "triton", "cuda"
            ):  # its order of adding is not fixed
                torch.testing.assert_close(one, other[p])
            else:
                assert torch.equal(one, other[p])


@pytest.mark.parametrize("name", list(MEASURES))
def test_non_finite_stays_in_its_problem(cell: Cell, name: str) -> None:
    """There every field is NaN, also the entropy of the other variable."""
    order, measure = MEASURES[name]
    for k in range(order):
        for value in (NAN, float("inf"), -float("inf")):
            data = related((3, 40), torch.float32, cell.device)[:order]
            data[k][1, 7] = value
            for found in measure(*data, backend=cell.backend):
                assert found.isnan().tolist() == [False, True, False]


def soft_slack(dtype: torch.dtype, cells: int) -> float:
    """How far three entropies of a soft histogram may be off.

    Each adds at most `cells` terms of −p log p, together at most log(cells), with p, the logarithm
    and the product rounded to a few units.
    """
    u = tolerances.UNIT_ROUNDOFF[tolerances.accumulation_dtype(dtype)]
    return 3 * (cells**0.5 + 8) * u * 2 * (1 + math.log(cells))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_variable_with_itself(cell: Cell, dtype: torch.dtype) -> None:
    x, y, _ = related((3, 80), dtype, cell.device)
    found = ops.mutual_information(x, x, 9, backend=cell.backend)
    slack = 8 * float(tolerances.entropy(torch.full((81,), 1.0)))
    slack += 4 * tolerances.UNIT_ROUNDOFF[tolerances.accumulation_dtype(dtype)]
    assert float((found.mi - found.h_x).abs().max()) <= slack
    assert float((found.h_x - found.h_y).abs().max()) <= slack
    assert bool((found.mi > 0.5).all())
    assert float((1 - found.nmi).abs().max()) <= 4 * slack
    given = ops.conditional_mutual_information(x, x, y, 9, backend=cell.backend)
    assert float((given.cmi - given.h_x_given_z).abs().max()) <= slack
    determined = ops.conditional_mutual_information(x, y, x, 9, backend=cell.backend)
    assert float(determined.cmi.max()) <= slack and float(determined.h_x_given_z.max()) <= slack


def test_constants_share_nothing(cell: Cell) -> None:
    x = torch.full((2, 30), 0.7, device=cell.device)
    y = torch.randn(2, 30, device=cell.device)
    for estimator, bins in (("histogram", 8), ("histogram", 1), ("soft", 7)):
        both = ops.mutual_information(x, x, bins, estimator, backend=cell.backend)
        slack = soft_slack(torch.float32, bins**2)
        assert all(float(value.abs().max()) <= slack for value in both[:3])
        # If a soft entropy is no more than rounding, its share is no more either.
        assert estimator == "soft" or both.nmi.tolist() == [0.0, 0.0]
        one = ops.mutual_information(x, y, bins, estimator, backend=cell.backend)
        assert float(one.mi.abs().max()) <= slack and float(one.h_x.abs().max()) <= slack
        assert bool((one.h_y > 0).all()) == (bins > 1)
    assert ops.co_information(x, x, x, 5, backend=cell.backend).tolist() == [0.0, 0.0]
    given = ops.conditional_mutual_information(x, x, x, 5, backend=cell.backend)
    assert all(value.tolist() == [0.0, 0.0] for value in given)


def test_rounding_is_not_taken_for_information(cell: Cell) -> None:
    """For these counts (n log n)/n is not log n; the quotient of such differences is 1."""
    for count in (23, 39, 43, 114, 205):
        x = torch.zeros(count, dtype=torch.float64, device=cell.device)
        assert ops.mutual_information(x, x + 1, 5, backend=cell.backend).nmi < 1e-12


@pytest.mark.parametrize("estimator", ["histogram", "soft"])
def test_symmetric_and_within_bounds(cell: Cell, estimator: str) -> None:
    x, y, _ = related((20, 40), torch.float64, cell.device)
    one = ops.mutual_information(x, y, 5, estimator, backend=cell.backend)
    other = ops.mutual_information(y, x, 5, estimator, backend=cell.backend)
    slack = 8 * float(tolerances.entropy(torch.ones(25)))
    assert float((one.mi - other.mi).abs().max()) <= slack
    assert float((one.h_x - other.h_y).abs().max()) <= slack
    assert bool((one.mi >= 0).all()) and bool((one.nmi >= 0).all()) and bool((one.nmi <= 1).all())
    assert bool((one.mi <= torch.minimum(one.h_x, one.h_y) + slack).all())
    assert bool((one.h_x <= math.log(5) + slack).all())


def test_co_information_is_symmetric(cell: Cell) -> None:
    x, y, z = related((3, 60), torch.float64, cell.device)
    slack = 14 * float(tolerances.entropy(torch.ones(125)))
    one = ops.co_information(x, y, z, 5, backend=cell.backend)
    for order in ((y, x, z), (z, y, x), (y, z, x)):
        other = ops.co_information(*order, 5, backend=cell.backend)
        assert float((one - other).abs().max()) <= slack


def test_synergy_and_redundancy(cell: Cell) -> None:
    """XOR has nothing of either alone, and one bit of both; three copies share theirs."""
    x = torch.tensor([0.0, 0.0, 1.0, 1.0], device=cell.device).repeat(10)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0], device=cell.device).repeat(10)
    xor = (x != y).float()
    bit = math.log(2)
    near_bit = pytest.approx(bit, abs=1e-6)
    assert -float(ops.co_information(x, y, xor, 2, backend=cell.backend)) == near_bit
    assert float(ops.co_information(x, x, x, 2, backend=cell.backend)) == near_bit
    assert float(ops.mutual_information(x, xor, 2, backend=cell.backend).mi) == pytest.approx(0.0)
    given = ops.conditional_mutual_information(x, y, xor, 2, backend=cell.backend)
    assert float(given.cmi) == near_bit and float(given.ncmi) == pytest.approx(1.0, abs=1e-6)
    copied = ops.conditional_mutual_information(x, x, y, 2, backend=cell.backend)
    assert float(copied.cmi) == near_bit
    assert float(ops.co_information(x, x, y, 2, backend=cell.backend)) == pytest.approx(0, abs=1e-6)


def gaussians(rho: float, count: int, device: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, dtype=torch.float64)
    y = rho * x + (1 - rho**2) ** 0.5 * torch.randn(count, dtype=torch.float64)
    return x.float().to(device), y.float().to(device)


@pytest.mark.parametrize("rho", [-0.8, 0.4, 0.7])
@pytest.mark.parametrize(("estimator", "variance"), [("histogram", 1 / 12), ("soft", 1 / 6)])
def test_the_known_information_of_gaussians(
    cell: Cell, estimator: str, variance: float, rho: float
) -> None:
    count, bins = (3_000, 12) if cell.slow else (20_000, 24)
    x, y = gaussians(rho, count, cell.device)
    found = float(ops.mutual_information(x, y, bins, estimator, backend=cell.backend).mi)
    steps = bins if estimator == "histogram" else bins - 1
    width = max(float(v.amax() - v.amin()) for v in (x, y)) / steps
    low, high = tolerances.binned_gaussian(abs(rho), count, width, variance)
    assert low <= found <= high + (bins - 1) ** 2 / (2 * count)


@pytest.mark.parametrize("estimator", ["histogram", "soft"])
def test_independent_variables_share_what_chance_does(cell: Cell, estimator: str) -> None:
    """2N·I is distributed as χ² with (bins − 1)² degrees of freedom, at most."""
    count, bins = 4_000, 6
    x, y = (torch.rand(count).to(cell.device) for _ in range(2))
    found = float(ops.mutual_information(x, y, bins, estimator, backend=cell.backend).mi)
    freedom = (bins - 1) ** 2
    assert 0 < found <= (freedom + 5 * (2 * freedom) ** 0.5) / (2 * count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_soft_estimate_is_that_of_its_counts(cell: Cell, dtype: torch.dtype) -> None:
    x, y, _ = related((3, 70), dtype, cell.device)
    found = ops.mutual_information(x, y, 8, "soft", backend=cell.backend)
    p = ops.soft_histogram(x, y, 8, backend=cell.backend).double().cpu().numpy() / 70
    wide = tolerances.accumulation_dtype(dtype)
    slack = soft_slack(dtype, 64)
    for k in range(3):
        expected = log_ratio(p[k], p[k].sum(1, keepdims=True) * p[k].sum(0))
        assert float(found.mi[k]) == pytest.approx(expected, rel=0, abs=slack)
        for value, margin in ((found.h_x, p[k].sum(1)), (found.h_y, p[k].sum(0))):
            entropy = -(margin[margin > 0] * numpy.log(margin[margin > 0])).sum()
            assert float(value[k]) == pytest.approx(entropy, rel=0, abs=slack)
    assert {value.dtype for value in found} == {wide}


def test_the_soft_estimate_has_a_gradient(cell: Cell) -> None:
    base = torch.tensor([[0.0, 1.37, 2.61, 5.43, 7.0, 3.3], [7.0, 0.23, 4.4, 0.0, 6.6, 2.2]])
    leaves = [base.double(), base.flip(1).double() * 2 - 3]
    leaves = [v.to(cell.device).requires_grad_() for v in leaves]

    def measure(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.mutual_information(x, y, 4, "soft", backend=cell.backend))

    assert torch.autograd.gradcheck(measure, leaves)
    one = leaves[0].detach()[0].requires_grad_()
    other = leaves[1].detach()[0]
    assert torch.autograd.gradcheck(lambda x: measure(x, other), [one])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_finite_where_cells_are_empty(cell: Cell, dtype: torch.dtype) -> None:
    x, y = (torch.randn(2, 5).to(dtype).to(cell.device).requires_grad_() for _ in range(2))
    found = ops.mutual_information(x, y, 30, "soft", backend=cell.backend)
    sum(value.sum() for value in found).backward()
    for leaf in (x, y):
        assert leaf.grad.dtype == dtype
        assert bool(leaf.grad.isfinite().all()) and bool(leaf.grad.count_nonzero())


def test_climbing_the_gradient_raises_the_information(cell: Cell) -> None:
    x, y = (v.double() for v in gaussians(0.3, 200, cell.device))
    found = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        mi = ops.mutual_information(leaf, y, 8, "soft", backend=cell.backend).mi
        (grad,) = torch.autograd.grad(mi, leaf)
        x = x + 1e-3 * grad / grad.norm()
        found.append(float(mi.detach()))
    assert found[1] > found[0]


def test_the_histogram_has_no_gradient(cell: Cell) -> None:
    x = torch.randn(20, device=cell.device, requires_grad=True)
    assert not ops.mutual_information(x, x, 4, backend=cell.backend).mi.requires_grad
    assert not ops.co_information(x, x, x, 4, backend=cell.backend).requires_grad


def test_mixed_dtypes(cell: Cell) -> None:
    x, y, z = (v[0] for v in related((1, 50), torch.float64, cell.device))
    found = ops.mutual_information(x, y.half(), 5, backend=cell.backend)
    assert torch.equal(
        found.mi, ops.mutual_information(x, y.half().double(), 5, backend=cell.backend).mi
    )
    soft = ops.mutual_information(x.bfloat16(), y.half(), 5, "soft", backend=cell.backend)
    assert soft.mi.dtype == torch.float32
    shared = ops.co_information(x.half(), y.half(), z.float(), 5, backend=cell.backend)
    assert shared.dtype == torch.float32


@pytest.mark.parametrize("name", list(MEASURES))
def test_no_host_sync(cell: Cell, name: str) -> None:
    order, measure = MEASURES[name]
    data = related((2, 40), torch.float32, cell.device)[:order]
    measure(*data, backend=cell.backend)  # compiled before
    with no_host_sync(cell.device):
        found = measure(*data, backend=cell.backend)
    assert bool(found[0].isfinite().all())


@settings(max_examples=8, **COMMON)
@given(
    count=st.integers(1, 120),
    bins=st.integers(1, 12),
    levels=st.integers(1, 9),
    seed=seeds,
    power=st.integers(-20, 20),
)
def test_blind_to_order_and_scale(cell: Cell, count, bins, levels, seed, power) -> None:
    """They agree to the last bit: powers of two are not rounded."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    x, y, z = (
        torch.randint(0, levels, (count,), generator=generator).float().to(cell.device)
        for _ in range(3)
    )
    order = torch.randperm(count, generator=generator).to(cell.device)
    one = ops.mutual_information(x, y, bins, backend=cell.backend)
    moved = ops.mutual_information(x[order], y[order] * 2.0**power, bins, backend=cell.backend)
    if len(y.unique()) > 1:  # constants are widened by a half, whatever their size
        assert all(torch.equal(a, b) for a, b in zip(one, moved, strict=True))
    given = ops.conditional_mutual_information(x, y, z, bins, backend=cell.backend)
    shared = ops.co_information(x, y, z, bins, backend=cell.backend)
    difference = float(one.mi - given.cmi - shared)
    assert abs(difference) <= 4 * tolerances.UNIT_ROUNDOFF[torch.float32] * (1 + float(one.mi))
    assert 0 <= float(given.ncmi) <= 1 and 0 <= float(one.nmi) <= 1


def test_bad_input() -> None:
    x = torch.randn(5)
    pair, triple = ops.mutual_information, ops.conditional_mutual_information
    for measure, arguments, error, match in [
        (pair, (x.long(), x, 3), TypeError, "x has dtype torch.int64"),
        (pair, (x, x.to(torch.complex64), 3), TypeError, "y has dtype torch.complex64"),
        (pair, (x, x.to_sparse(), 3), TypeError, "y has layout torch.sparse_coo"),
        (pair, (x, [1.0], 3), TypeError, "y is not a tensor but list"),
        (pair, (x[0], x, 3), ValueError, r"x must be \[N\] or \[P, N\], got \[\]"),
        (pair, (x, x[None, None], 3), ValueError, r"y must be \[N\] or \[P, N\], got \[1, 1, 5\]"),
        (pair, (x, x[:4], 3), ValueError, r"must have one shape: x is \[5\], y \[4\]"),
        (pair, (x, x[None], 3), ValueError, r"must have one shape: x is \[5\], y \[1, 5\]"),
        (pair, (x, x.to("meta"), 3), ValueError, "y is on meta, x on cpu"),
        (pair, (x[:0], x[:0], 3), ValueError, r"x is empty \(\[0\]\)"),
        (pair, (x, x, 0), ValueError, "bins must be from 1 to 256, got 0"),
        (pair, (x, x, 257), ValueError, "bins must be from 1 to 256, got 257"),
        (pair, (x, x, 2.5), TypeError, "bins must be an integer, got float"),
        (pair, (x, x, True), TypeError, "bins must be an integer, got bool"),
        (pair, (x, x, 1, "soft"), ValueError, "bins must be from 2 to 256, got 1"),
        (pair, (x, x, 257, "soft"), ValueError, "bins must be from 2 to 256, got 257"),
        (pair, (x, x, 3, "kernel"), ValueError, "estimator must be 'histogram' or 'soft'.*kernel"),
        (triple, (x, x, x.long(), 3), TypeError, "z has dtype torch.int64"),
        (triple, (x, x, x[:4], 3), ValueError, r"x is \[5\], z \[4\]"),
        (triple, (x, x, x, 33), ValueError, "bins must be from 1 to 32, got 33"),
        (triple, (x[:0], x[:0], x[:0], 3), ValueError, "x is empty"),
    ]:
        with pytest.raises(error, match=match):
            measure(*arguments)
        if measure is triple:
            with pytest.raises(error, match=match):
                ops.co_information(*arguments)
