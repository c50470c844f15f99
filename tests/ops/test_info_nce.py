"""info_nce: the bound and its gradients, from tiles of similarities that are never held."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, strided, wide
from no_sync import no_host_sync
from strategies import COMMON, dtypes, seeds
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops
from mmfuse.reference.info_nce import info_nce as reference
from mmfuse.reference.info_nce import info_nce_backward as reference_backward

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from engine.cost import cost_of
from engine.measure import Prepared

NAN = float("nan")
FEW_SHAPES = [(1, 1), (2, 6), (9, 7), (33, 20)]
SHAPES = [*FEW_SHAPES, (1, 8), (3, 1), (65, 33), (129, 5), (257, 16), (5, 1025)]

# Elements of a tile at most: what a kernel may hold of the similarities at a time.
TILE = 2**22


class Sums(NamedTuple):
    """Similarities in float64, how far a backend's may be off, and their log-sum-exps."""

    s: Tensor
    error: Tensor
    sums: tuple[Tensor, Tensor]
    errors: tuple[Tensor, Tensor]


def sums_of(a: Tensor, b: Tensor, temperature: Tensor, dtype: torch.dtype) -> Sums:
    a, b, tau = wide([a, b, temperature])
    s = a @ b.T / tau
    error = tolerances.similarity(dtype, a.abs() @ b.abs().T / tau, a.shape[1])
    sums = s.logsumexp(1), s.logsumexp(0)
    errors = tuple(tolerances.log_sum_exp(dtype, x, e) for x, e in ((s, error), (s.T, error.T)))
    return Sums(s, error, sums, errors)


def bound_of(dtype: torch.dtype, k: Sums) -> Tensor:
    sums, errors = sum(k.sums) / 2, sum(k.errors) / 2
    return tolerances.info_nce(dtype, k.s.diagonal(), k.error.diagonal(), sums, errors)


def gradient_bounds(
    dtype: torch.dtype,
    exact: list[Tensor],
    expected: tuple[Tensor, ...],
    k: Sums,
    *,
    halves: bool = False,
) -> list[Tensor]:
    """Bounds for the gradients of a, b and temperature; `exact` holds grad, a, b, temperature."""
    grad, a, b, tau = exact
    weight = grad.abs() / len(a)
    softmax, error = torch.zeros_like(k.s), torch.zeros_like(k.s)
    for sums, sums_error in zip(k.sums, k.errors, strict=True):
        column = sums is k.sums[1]
        shape = (1, -1) if column else (-1, 1)
        one, its_error = sums.view(shape), sums_error.view(shape)
        softmax += (k.s - one).exp() / 2
        error += tolerances.info_nce_slope(dtype, k.s, k.error, one, its_error) / 2
    slope = weight * (torch.eye(len(a)) + softmax)
    error = weight * error
    return [
        tolerances.info_nce_gradient(dtype, expected[0], slope, error, b, tau, halves=halves),
        tolerances.info_nce_gradient(dtype, expected[1], slope.T, error.T, a, tau, halves=halves),
        tolerances.info_nce_temperature_gradient(dtype, k.s, k.error, slope, error, tau),
    ]


def features(
    batch: int, width: int, dtype: torch.dtype, device: str, size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Partners are alike."""
    a = torch.randn(batch, width)
    b = a + torch.randn(batch, width)
    return tuple((size * x).to(dtype).to(device) for x in (a, b))


def temperature_of(value: float, dtype: torch.dtype, device: str) -> Tensor:
    return torch.tensor(value, dtype=tolerances.accumulation_dtype(dtype), device=device)


def check(
    cell: Cell, a: Tensor, b: Tensor, temperature: float | Tensor = 0.5, *, gradients: bool = True
) -> Tensor:
    """Compares the bound and, of weight·bound, the gradients of a, b and the temperature."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    before = a.detach().clone(), b.detach().clone()
    dtype = torch.promote_types(a.dtype, b.dtype)
    tau = temperature
    if not isinstance(tau, Tensor):
        tau = temperature_of(tau, dtype, cell.device)
    tau = tau.detach().requires_grad_()
    given = temperature if not isinstance(temperature, Tensor) and not gradients else tau
    result = ops.info_nce(a, b, given, backend=cell.backend)
    wide_type = tolerances.accumulation_dtype(dtype)
    assert (result.dtype, result.shape, result.device) == (wide_type, (), a.device)
    known = sums_of(a, b, tau, dtype)
    exact = wide([a, b, tau])
    expected = reference(*exact)
    what = f"{tuple(a.shape)}, {dtype}"
    tolerances.assert_within(result, expected[0], bound_of(dtype, known), f"bound of {what}")
    if gradients:
        weight = (1 + torch.rand(())).to(result)
        (weight * result).backward()
        exact = [*wide([weight]), *exact]
        expected = reference_backward(*exact, *expected[1:])
        # These give halves to tensor cores as they are, slopes too.
        halves = cell.backend in ("triton", "cuda")
        bounds = gradient_bounds(dtype, exact, expected, known, halves=halves)
        for leaf, value, bound, name in zip((a, b, tau), expected, bounds, "abt", strict=True):
            assert (leaf.grad.dtype, leaf.grad.shape) == (leaf.dtype, leaf.shape)
            stored = tolerances.UNIT_ROUNDOFF[leaf.dtype] * value.abs()
            tolerances.assert_within(leaf.grad, value, bound + stored, f"gradient {name}, {what}")
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]), "an input was written to"
    return result.detach()


def shapes(cell: Cell) -> list[tuple[int, int]]:
    return FEW_SHAPES if cell.slow else SHAPES


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_parity(cell: Cell, dtype: torch.dtype, temperature: float) -> None:
    for batch, width in shapes(cell):
        check(cell, *features(batch, width, dtype, cell.device), temperature)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exps_of_rows_and_columns(cell: Cell, dtype: torch.dtype) -> None:
    overload = getattr(torch.ops.mmfuse.info_nce, cell.backend)
    for batch, width in shapes(cell):
        a, b = features(batch, width, dtype, cell.device)
        tau = temperature_of(0.3, dtype, cell.device)
        found = overload(a, b, tau)[1:]
        known = sums_of(a, b, tau, dtype)
        for k, (actual, expected) in enumerate(zip(found, known.sums, strict=True)):
            assert (actual.dtype, actual.shape) == (tau.dtype, (batch,))
            what = f"{('rows', 'columns')[k]} of {batch}"
            tolerances.assert_within(actual, expected, known.errors[k], what)


@pytest.mark.slow
@ON_THE_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles(cell: Cell, dtype: torch.dtype) -> None:
    batch = 2100
    assert 1 < batch**2 / TILE < 2, "two tiles, and the second one is smaller"
    a, b = features(batch, 3, dtype, cell.device)
    check(cell, a, b)


@pytest.mark.slow
@ON_THE_CPU
def test_minus_infinity_fills_the_first_tile_of_a_column(cell: Cell) -> None:
    """The running sums then begin at -inf; the similarities overflow, the features do not."""
    batch, first = 2100, TILE // 2100
    a, b = features(batch, 3, torch.float32, cell.device)
    a[:, 2], b[:, 2] = 0.0, 0.0
    a[:first, 2] = 1e30
    b[7, 2] = -1e30
    a[7, 2] = 0.0  # its own partner is finite
    tau = temperature_of(1.0, torch.float32, cell.device)
    known = sums_of(a, b, tau, torch.float32)
    minus = known.s[:, 7].abs() > 1e38
    assert int(minus.sum()) == first - 1
    result = ops.info_nce(a, b, tau, backend=cell.backend)
    expected = reference(*(x.float() for x in (a, b, tau)))[0]
    tolerances.assert_within(result, expected, 2 * finite_bound(a, b, tau))


def finite_bound(a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
    """The bound without the similarities that underflow in every exponential."""
    known = sums_of(a, b, tau, torch.float32)
    away = known.s < -1e30
    s, error = known.s.masked_fill(away, -1e4), known.error.masked_fill(away, 0.0)
    errors = [tolerances.log_sum_exp(torch.float32, x, e) for x, e in ((s, error), (s.T, error.T))]
    return bound_of(torch.float32, Sums(s, error, (s.logsumexp(1), s.logsumexp(0)), tuple(errors)))


@pytest.mark.parametrize("where", ["row", "column", "one"])
def test_similarities_of_minus_infinity(cell: Cell, where: str) -> None:
    """They weigh nothing, also where a row or a column begins with them."""
    batch = 40 if cell.slow else 300
    a, b = features(batch, 3, torch.float32, cell.device)
    a[:, 2], b[:, 2] = 0.0, 0.0
    last = batch - 1
    many, one = (b, a) if where == "row" else (a, b)
    one[last, 2] = -1e30
    many[: 1 if where == "one" else last, 2] = 1e30
    tau = temperature_of(1.0, torch.float32, cell.device)
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    result = ops.info_nce(*leaves, tau, backend=cell.backend)
    other = [x.clone().requires_grad_() for x in (a, b)]
    s = other[0] @ other[1].T
    assert int(s.isinf().sum()) == (1 if where == "one" else last)
    expected = reference(*(x.detach() for x in other), tau)
    assert bool(expected[0].isfinite())
    tolerances.assert_within(result, expected[0], 2 * finite_bound(a, b, tau))
    result.backward()
    one = torch.ones((), device=cell.device)
    grads = reference_backward(one, *(x.detach() for x in other), tau, *expected[1:])
    for k, leaf in enumerate(leaves):
        # The third column multiplies 1e30 by what rounding left of the slopes.
        torch.testing.assert_close(leaf.grad[:, :2], grads[k][:, :2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_formula_of_the_docstring(cell: Cell, dtype: torch.dtype) -> None:
    a, b = features(20, 6, dtype, cell.device)
    i = torch.arange(20)
    s = a.cpu() @ b.cpu().T / 0.1
    expected = math.log(20) - (F.cross_entropy(s, i) + F.cross_entropy(s.T, i)) / 2
    bound = bound_of(dtype, sums_of(a, b, temperature_of(0.1, dtype, "cpu"), dtype))
    actual = ops.info_nce(a, b, backend=cell.backend)
    tolerances.assert_within(actual, expected, 2 * bound)  # each side has its own error


def test_the_gradient_is_pytorchs(cell: Cell) -> None:
    a, b = features(12, 5, torch.float64, cell.device)
    gradients = []
    for formula in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (a, b)]
        tau = temperature_of(0.7, torch.float64, cell.device).requires_grad_()
        if formula:
            s = leaves[0] @ leaves[1].T / tau
            i = torch.arange(12, device=cell.device)
            result = math.log(12) - (F.cross_entropy(s, i) + F.cross_entropy(s.T, i)) / 2
        else:
            result = ops.info_nce(*leaves, tau, backend=cell.backend)
        result.backward()
        gradients.append([leaf.grad for leaf in (*leaves, tau)])
    exact = wide([torch.ones(()), a, b, tau])
    known = sums_of(a, b, tau, torch.float64)
    bounds = gradient_bounds(torch.float64, exact, wide(gradients[1]), known)
    for actual, expected, bound in zip(*gradients, bounds, strict=True):
        tolerances.assert_within(actual, expected, 2 * bound)


def test_gradcheck(cell: Cell) -> None:
    a, b = features(4, 3, torch.float64, cell.device)
    tau = temperature_of(0.8, torch.float64, cell.device)
    leaves = [x.requires_grad_() for x in (a, b, tau)]
    assert torch.autograd.gradcheck(lambda *x: ops.info_nce(*x, backend=cell.backend), leaves)
    itself = leaves[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.info_nce(x, 2 * x + leaves[1].detach(), backend=cell.backend), [itself]
    )


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_some_only(cell: Cell, needed: tuple[bool, ...]) -> None:
    a, b = features(9, 5, torch.float32, cell.device)
    tau = temperature_of(0.5, torch.float32, cell.device)
    overload = getattr(torch.ops.mmfuse.info_nce, cell.backend)
    backward = getattr(torch.ops.mmfuse.info_nce_backward, cell.backend)
    expected = backward(torch.ones_like(tau), a, b, tau, *overload(a, b, tau)[1:])
    leaves = [x.requires_grad_(n) for x, n in zip((a, b, tau), needed, strict=True)]
    result = ops.info_nce(*leaves, backend=cell.backend)
    assert result.requires_grad == any(needed)
    if any(needed):
        result.backward()
    for leaf, need, grad in zip(leaves, needed, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_0d_gradient_and_temperature(cell: Cell, dtype: torch.dtype) -> None:
    """Autograd may hand over one element of something, or an expanded number."""
    a, b = features(6, 5, dtype, cell.device)
    numbers = torch.tensor([[9.0, 0.75], [9.0, 9.0]]).to(
        cell.device, tolerances.accumulation_dtype(dtype)
    )
    plain = temperature_of(0.75, dtype, cell.device)
    overload = getattr(torch.ops.mmfuse.info_nce, cell.backend)
    backward = getattr(torch.ops.mmfuse.info_nce_backward, cell.backend)
    forward = overload(a, b, plain)
    expected = backward(plain, a, b, plain, *forward[1:])
    for number in (numbers[0, 1], numbers[0, 1:].expand(3)[2], numbers.t()[1, 0]):
        again = overload(a, b, number)
        actual = backward(number, a, b, number, *again[1:])
        pairs = zip((*again, *actual), (*forward, *expected), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(DTYPES, 2)), ids=str)
def test_mixed_dtypes_are_promoted(cell: Cell, first: torch.dtype, second: torch.dtype) -> None:
    a = features(9, 5, first, cell.device)[0]
    b = features(9, 5, second, cell.device)[1]
    check(cell, a, b)


@pytest.mark.parametrize("given", DTYPES, ids=str)
def test_temperatures_of_other_dtypes(cell: Cell, given: torch.dtype) -> None:
    a, b = features(9, 5, torch.float32, cell.device)
    tau = torch.tensor(0.3, dtype=given, device=cell.device, requires_grad=True)
    ops.info_nce(a, b, tau, backend=cell.backend).backward()
    assert (tau.grad.dtype, tau.grad.shape) == (given, ())
    check(cell, a, b, tau.detach().float())
    with torch.no_grad():
        number = ops.info_nce(a, b, 2, backend=cell.backend)
        assert torch.equal(number, ops.info_nce(a, b, 2.0, backend=cell.backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_has_no_other_to_be_told_from(cell: Cell, dtype: torch.dtype) -> None:
    a, b = (x.requires_grad_() for x in features(1, 7, dtype, cell.device))
    result = check(cell, a, b)
    tau = temperature_of(0.5, dtype, "cpu")
    assert abs(float(result)) <= float(bound_of(dtype, sums_of(a, b, tau, dtype)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_without_features(cell: Cell, dtype: torch.dtype, batch: int) -> None:
    """All similarities are zero: nothing is shared."""
    a, b = (torch.zeros(batch, 0, dtype=dtype, device=cell.device) for _ in range(2))
    tau = temperature_of(0.5, dtype, "cpu")
    assert abs(float(check(cell, a, b))) <= float(bound_of(dtype, sums_of(a, b, tau, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-15, 1e-3, 60.0, 100.0], ids=str)
def test_extreme_similarities(cell: Cell, dtype: torch.dtype, size: float) -> None:
    """They go from 0 to ±1e4 and more, where exp overflows in every precision."""
    for batch, width in ((2, 6), (33, 5)):
        a, b = features(batch, width, dtype, cell.device, size)
        check(cell, a, b, 1.0)
        check(cell, a, -b, 1.0)
        assert bool(ops.info_nce(a, b, 1.0, backend=cell.backend).isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_similarities_that_agree_only_with_the_partner(cell: Cell, dtype: torch.dtype) -> None:
    """1e4 on the diagonal, 0 elsewhere: the bound is log B, and the slopes are gone."""
    a = 100 * torch.eye(9, dtype=dtype, device=cell.device)
    assert float(check(cell, a, a, 1.0)) == pytest.approx(math.log(9), rel=1e-6)
    leaf = a.requires_grad_()
    ops.info_nce(leaf, a.detach(), 1.0, backend=cell.backend).backward()
    assert not bool(leaf.grad.count_nonzero())
    with torch.no_grad():
        away = ops.info_nce(a, a.roll(1, 0), 1.0, backend=cell.backend)
    assert float(away) == pytest.approx(math.log(9) - 1e4, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")], ids=str)
def test_non_finite_comes_out(cell: Cell, dtype: torch.dtype, value: float) -> None:
    """A feature that is infinite makes some similarity infinite, or NaN; one is the partner's."""
    for k, where in ((0, (0, 0)), (1, (6, 4))):
        pair = [x.clone() for x in features(7, 5, dtype, cell.device)]
        pair[k][where] = value
        a, b = (x.requires_grad_() for x in pair)
        result = ops.info_nce(a, b, backend=cell.backend)
        assert not bool(result.isfinite())
        if value != value:
            assert bool(result.isnan())
            result.backward()
            assert bool(a.grad.isnan().any()) and bool(b.grad.isnan().any())


def test_a_temperature_that_is_nan_or_zero(cell: Cell) -> None:
    """A tensor's value is not looked at: what comes out is no number."""
    a, b = features(7, 5, torch.float32, cell.device)
    for value in (NAN, 0.0):
        tau = torch.tensor(value, device=cell.device)
        assert bool(ops.info_nce(a, b, tau, backend=cell.backend).isnan())


@pytest.mark.parametrize("view", list(strided("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    check(cell, *strided(cell.device)[view])


def test_symmetric_in_its_arguments_and_in_the_order_of_rows(cell: Cell) -> None:
    a, b = features(21, 6, torch.float32, cell.device)
    one = check(cell, a, b)
    order = torch.randperm(21).to(cell.device)
    bound = 2 * bound_of(torch.float32, sums_of(a, b, temperature_of(0.5, a.dtype, "cpu"), a.dtype))
    for other in (check(cell, b, a), check(cell, a[order], b[order])):
        tolerances.assert_within(other, one, bound)


def gaussian_features(rho: float, batch: int, device: str) -> tuple[Tensor, Tensor, float]:
    """Features whose product is the log density ratio of a correlated pair; and its mean.

    log p(b|a)/p(b) = (2ρab − ρ²(a² + b²))/(2(1 − ρ²)) − ln(1 − ρ²)/2, without the constant.
    """
    a = torch.randn(batch, dtype=torch.float64)
    b = rho * a + (1 - rho**2) ** 0.5 * torch.randn(batch, dtype=torch.float64)
    half = rho**2 / (2 * (1 - rho**2))
    one = torch.ones_like(a)
    left = torch.stack([a, a.square(), one], 1)
    right = torch.stack([b * rho / (1 - rho**2), -half * one, -half * b.square()], 1)
    ratio = float((left * right).sum(1).mean()) - 0.5 * math.log(1 - rho**2)
    return left.float().to(device), right.float().to(device), ratio


@pytest.mark.parametrize("rho", [0.3, 0.6])
def test_the_known_information_of_gaussians(cell: Cell, rho: float) -> None:
    """With the best critic the bound is tight where the information is small.

    Its expectation is at most I, and at least I − χ²/B with χ² = ρ²/(1 − ρ²) (Jensen: the mean of
    ratios over a batch has the expectation 1 + χ²/B). The mean log ratio of the same sample has the
    variance ρ²/B; past it, the sums over the other rows fluctuate by √χ²/B, up to a factor.
    """
    batch = 256 if cell.slow else 1024
    a, b, ratio = gaussian_features(rho, batch, cell.device)
    found = float(ops.info_nce(a, b, 1.0, backend=cell.backend))
    exact, chi = -0.5 * math.log(1 - rho**2), rho**2 / (1 - rho**2)
    sampled = 5 * rho / batch**0.5
    assert exact - chi / batch - sampled <= found <= exact + sampled
    assert abs(found - ratio) <= (chi + 5 * chi**0.5) * 2 / batch
    assert found <= math.log(batch)


@pytest.mark.parametrize("batch", [2, 16, 63])
def test_never_above_the_log_of_the_batch(cell: Cell, batch: int) -> None:
    a = F.normalize(torch.randn(batch, 64), dim=1).to(cell.device)
    found = float(ops.info_nce(a, a, 0.01, backend=cell.backend))
    most = math.log(batch) * (1 + 4 * tolerances.UNIT_ROUNDOFF[torch.float32])
    assert most - 0.05 < found <= most
    a, b = features(batch, 4, torch.float32, cell.device)
    assert float(ops.info_nce(a, b, backend=cell.backend)) <= most


def test_independent_features_share_nothing(cell: Cell) -> None:
    batch = 128
    a, b = (torch.randn(batch, 3).to(cell.device) for _ in range(2))
    # A bound that is not the best one is below 0, but for the fluctuation of B similarities.
    spread = float((a @ b.T).std())
    assert float(ops.info_nce(a, b, 1.0, backend=cell.backend)) < 5 * spread / batch**0.5


@ON_THE_CPU
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_similarities_are_never_held(cell: Cell, backward: bool) -> None:
    batch = 4096
    a, b = (x.requires_grad_(backward) for x in features(batch, 4, torch.float32, cell.device))
    tau = temperature_of(0.5, torch.float32, cell.device)

    def call() -> None:
        result = ops.info_nce(a, b, tau, backend=cell.backend)
        if backward:
            torch.autograd.grad(result, (a, b))

    extra = cost_of(Prepared(call, compiled=True), torch.device("cpu")).extra_bytes
    few = 32 * a.nbytes
    assert 0 < extra <= 2 * 4 * TILE + few < 4 * batch**2


def test_the_same_bits_again(cell: Cell) -> None:
    a, b = (x.requires_grad_() for x in features(65, 20, torch.float32, cell.device))
    results = []
    for _ in range(2):
        result = ops.info_nce(a, b, backend=cell.backend)
        results.append((result.detach(), *torch.autograd.grad(result, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_no_host_sync(cell: Cell) -> None:
    a, b = (x.requires_grad_() for x in features(20, 5, torch.float32, cell.device))
    tau = temperature_of(0.5, torch.float32, cell.device).requires_grad_()
    ops.info_nce(a, b, tau, backend=cell.backend).backward()  # compiled before
    with no_host_sync(cell.device):
        ops.info_nce(a, b, tau, backend=cell.backend).backward()
    assert bool(tau.grad.isfinite())


@settings(max_examples=6, **COMMON)
@given(
    batch=st.integers(1, 70),
    width=st.integers(0, 40),
    dtype=dtypes,
    seed=seeds,
    temperature=st.floats(0.05, 20.0),
    size=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_any_shape(cell: Cell, batch, width, dtype, seed, temperature, size) -> None:
    torch.manual_seed(seed % 2**63)
    a, b = features(batch, width, dtype, cell.device, size)
    check(cell, a, b, temperature)


def test_bad_input() -> None:
    z, t = torch.ones(3, 2), 0.1
    for arguments, error, match in [
        ((z.long(), z, t), TypeError, "a has dtype torch.int64"),
        ((z, z.to(torch.complex64), t), TypeError, "b has dtype torch.complex64"),
        ((z, z.to_sparse(), t), TypeError, "b has layout torch.sparse_coo"),
        ((z, [1.0], t), TypeError, "b is not a tensor but list"),
        ((z[0], z[0], t), ValueError, r"a must be \[B, D\], got \[2\]"),
        ((z, z[None], t), ValueError, r"b must be \[B, D\], got \[1, 3, 2\]"),
        ((z, z[:2], t), ValueError, r"must have one shape: a is \[3, 2\], b \[2, 2\]"),
        ((z, z[:, :1], t), ValueError, r"must have one shape: a is \[3, 2\], b \[3, 1\]"),
        ((z, z.to("meta"), t), ValueError, "b is on meta, a on cpu"),
        ((z[:0], z[:0], t), ValueError, "a and b are empty"),
        ((z, z, 0.0), ValueError, "temperature must be a positive number, got 0.0"),
        ((z, z, -1), ValueError, "temperature must be a positive number, got -1"),
        ((z, z, NAN), ValueError, "temperature must be a positive number, got nan"),
        ((z, z, math.inf), ValueError, "temperature must be a positive number, got inf"),
        ((z, z, torch.ones(1)), ValueError, r"temperature must be a number or a dense 0-d .*\[1\]"),
        ((z, z, torch.tensor(1)), ValueError, r"temperature must be .* got torch.int64"),
    ]:
        with pytest.raises(error, match=match):
            ops.info_nce(*arguments)
