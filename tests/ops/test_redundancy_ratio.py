"""redundancy_ratio: every backend against float64, its gradients, and the edges."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import CHUNK_EDGES, DTYPES, SIZES, gradients, like, strided_views, wide
from samples import BOUNDS
from strategies import COMMON, dtypes, seeds
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.reference.redundancy_ratio import EPS
from mmfuse.reference.redundancy_ratio import redundancy_ratio as reference


def check(cell: Cell, z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    before = [t.clone() for t in (z1, z2, input_sq)]
    ratio = ops.redundancy_ratio(z1, z2, input_sq, backend=cell.backend)
    for tensor, copy in zip((z1, z2, input_sq), before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"
    dtype = tolerances.accumulation_dtype(z1.dtype)
    assert (ratio.dtype, ratio.shape, ratio.device) == (dtype, (), z1.device)
    expected = reference(*wide([z1, z2, input_sq]))
    (bound,) = BOUNDS["redundancy_ratio"]((z1, z2, input_sq), [expected])
    tolerances.assert_within(ratio, expected, bound, f"ratio of {tuple(z1.shape)}")
    return ratio


def some(cell: Cell, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input_sq that a kernel could have returned."""
    return (0.01 + torch.rand(())).to(cell.device, tolerances.accumulation_dtype(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cell: Cell, dtype: torch.dtype) -> None:
    # The reference has no chunks.
    sizes = SIZES if cell.backend == "reference" else cell.affordable(SIZES + CHUNK_EDGES)
    z1 = gradients(sizes, dtype, cell.device)
    for one, other in zip(z1, like(z1), strict=True):
        check(cell, one, other, some(cell, dtype))


def test_is_the_formula_of_the_docstring(cell: Cell) -> None:
    z1, z2 = (torch.randn(5, 7, 3, dtype=torch.float64, device=cell.device) for _ in range(2))
    input_sq = some(cell, torch.float64)
    ratio = ops.redundancy_ratio(z1, z2, input_sq, backend=cell.backend)
    expected = (z1 - z2).square().mean() / (input_sq + 1e-12)
    bound = tolerances.redundancy(torch.float64, expected, 105, input_sq + 1e-12)
    tolerances.assert_within(ratio, expected, 2 * bound)  # each side has its own error


def test_an_encoder_that_changes_nothing_has_ratio_one(cell: Cell) -> None:
    x = torch.randn(20, 30).to(cell.device)
    views = ops.noisy_views(x, 0.03, NoiseStream(1, cell.device), backend=cell.backend)
    ratio = check(cell, *views)
    one = torch.ones(())
    tolerances.assert_within(
        ratio, one, 2 * tolerances.redundancy(torch.float32, one, 600, views.input_sq.cpu())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_representations_give_exactly_zero(cell: Cell, dtype: torch.dtype) -> None:
    z = gradients([1027], dtype, cell.device)[0]
    assert float(ops.redundancy_ratio(z, z.clone(), some(cell, dtype), backend=cell.backend)) == 0
    assert float(ops.redundancy_ratio(z, z, some(cell, dtype), backend=cell.backend)) == 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)], ids=str)
def test_empty_representations_give_nan(cell: Cell, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, device=cell.device, requires_grad=True)
    ratio = ops.redundancy_ratio(z, z.detach(), some(cell), backend=cell.backend)
    assert bool(ratio.isnan())
    ratio.backward()
    assert z.grad.shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4, 5)], ids=str)
def test_any_shape(cell: Cell, shape: tuple[int, ...]) -> None:
    z1, z2 = (torch.randn(shape).to(cell.device) for _ in range(2))
    check(cell, z1, z2, some(cell))


@pytest.mark.parametrize("view", list(strided_views("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    z = strided_views(cell.device)[view]
    alike, plain = torch.empty_like(z).copy_(torch.randn(z.shape)), torch.randn(z.shape)
    check(cell, z, alike, some(cell))
    check(cell, z, plain.to(cell.device), some(cell))
    check(cell, plain.to(cell.device), z, some(cell))


def test_strided_gradients(cell: Cell) -> None:
    """Read in storage order, both channels_last; the gradient is in the order of its tensor."""
    values = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        z1, z2 = (
            v.to(cell.device).to(memory_format=memory_format).requires_grad_() for v in values
        )
        ops.redundancy_ratio(
            z1, z2, torch.ones_like(z1).mean().detach(), backend=cell.backend
        ).backward()
        results.append((z1.grad, z2.grad))
    for plain, last in zip(*results, strict=True):
        tolerances.assert_within(
            last, plain, 2 * tolerances.redundancy_gradient(torch.float64, plain)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype) -> None:
    sizes = [1, 1027]
    odd = [gradients(sizes, dtype, cell.device, odd_address=True) for _ in range(2)]
    for z1, z2 in zip(*odd, strict=True):
        check(cell, z1, z2, some(cell, dtype))
        check(cell, z1, z2.clone(), some(cell, dtype))


def test_a_large_mean_does_not_cancel(cell: Cell) -> None:
    """Σz₁² + Σz₂² − 2Σz₁z₂ would lose everything in float32."""
    z1, z2 = ((1e4 + 1e-2 * torch.randn(3000, dtype=torch.float64)).float() for _ in range(2))
    assert float(check(cell, z1.to(cell.device), z2.to(cell.device), some(cell))) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-15, 1e15], ids=str)
def test_extreme_magnitudes(cell: Cell, dtype: torch.dtype, size: float) -> None:
    limits = torch.finfo(dtype)
    size = min(max(size, limits.tiny), limits.max / 16)
    z1, z2 = (
        (size * torch.randn(1001, dtype=torch.float64)).to(dtype).to(cell.device) for _ in range(2)
    )
    wide_type = tolerances.accumulation_dtype(dtype)
    for input_sq in (size**2, 1.0):
        ratio = check(cell, z1, z2, torch.tensor(input_sq, dtype=wide_type, device=cell.device))
        assert bool(ratio.isfinite()) and float(ratio) > 0


@pytest.mark.parametrize("value", [0.0, 1e-15, 1e-12, float("inf")], ids=str)
def test_input_that_did_not_change(cell: Cell, value: float) -> None:
    z1, z2 = (torch.randn(100).to(cell.device) for _ in range(2))
    ratio = check(cell, z1, z2, torch.tensor(value, device=cell.device))
    assert bool(ratio.isfinite())


@pytest.mark.parametrize("given", DTYPES, ids=str)
def test_input_sq_of_another_dtype(cell: Cell, given: torch.dtype) -> None:
    for dtype in DTYPES:
        z1, z2 = (torch.randn(100).to(dtype).to(cell.device) for _ in range(2))
        # 0.375 is the same number in all of them.
        check(cell, z1, z2, torch.tensor(0.375, dtype=given, device=cell.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 700, 1500])
def test_non_finite_comes_out(cell: Cell, dtype: torch.dtype, where: int) -> None:
    z = gradients([1501, 1501], dtype, cell.device)
    input_sq = some(cell, dtype)
    for value, expected in (("inf", "inf"), ("-inf", "inf"), ("nan", "nan")):
        z[0][where] = float(value)
        for pair in (z, z[::-1]):
            ratio = ops.redundancy_ratio(*pair, input_sq, backend=cell.backend)
            assert str(float(ratio)) == expected
    z[0][where] = z[1][where] = float("inf")  # Inf − Inf
    assert bool(ops.redundancy_ratio(*z, input_sq, backend=cell.backend).isnan())


def test_nan_of_the_input_comes_out(cell: Cell) -> None:
    z = torch.randn(2, 5).to(cell.device)
    nan = torch.tensor(float("nan"), device=cell.device)
    assert bool(ops.redundancy_ratio(z[0], z[1], nan, backend=cell.backend).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (33, 31), (64, 100)], ids=str)
def test_gradient_parity(cell: Cell, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    z = [torch.randn(shape).to(dtype).to(cell.device).requires_grad_() for _ in range(2)]
    input_sq = some(cell, dtype).requires_grad_()
    weight = torch.randn(()).to(cell.device, input_sq.dtype)
    (weight * ops.redundancy_ratio(*z, input_sq, backend=cell.backend)).backward()
    exact = [t.requires_grad_() for t in wide([*z, input_sq])]
    (wide([weight])[0] * reference(*exact)).backward()
    for k in (0, 1):
        assert z[k].grad.dtype == dtype
        bound = tolerances.redundancy_gradient(dtype, exact[k].grad)
        tolerances.assert_within(z[k].grad, exact[k].grad, bound, f"gradient of z{k + 1}")
    divisor = (exact[2].detach() + EPS) ** 2
    count = z[0].numel()
    bound = tolerances.redundancy_input_gradient(dtype, exact[2].grad, count, divisor)
    tolerances.assert_within(input_sq.grad, exact[2].grad, bound, "gradient of input_sq")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_sq", [2e-6, 1e-3, 1e3], ids=str)
def test_gradient_does_not_leave_the_range_on_its_way(
    cell: Cell, dtype: torch.dtype, input_sq: float
) -> None:
    """2/(n·input_sq) may be too large or too small for float16 where the gradient is not."""
    z1 = torch.tensor([1.0, 2.0, 3.0, 40.0], device=cell.device).to(dtype).requires_grad_()
    z2 = torch.tensor([1.0, 2.0, 2.998, 40.0], device=cell.device).to(dtype)
    ratio = ops.redundancy_ratio(
        z1, z2, torch.tensor(input_sq, device=cell.device), backend=cell.backend
    )
    ratio.backward()
    exact = wide([z1, z2, torch.tensor(input_sq)])
    exact[0].requires_grad_()
    reference(*exact).backward()
    assert bool(exact[0].grad.to(dtype).isfinite().all())
    bound = tolerances.redundancy_gradient(dtype, exact[0].grad)
    tolerances.assert_within(z1.grad, exact[0].grad, bound)


def test_gradcheck_and_gradgradcheck(cell: Cell) -> None:
    leaves = [
        torch.randn(2, 2, dtype=torch.float64, device=cell.device, requires_grad=True)
        for _ in range(2)
    ]
    input_sq = some(cell, torch.float64).requires_grad_()

    def ratio(*tensors: Tensor) -> Tensor:
        return ops.redundancy_ratio(*tensors, backend=cell.backend)

    assert torch.autograd.gradcheck(ratio, (*leaves, input_sq))
    assert torch.autograd.gradgradcheck(ratio, (*leaves, input_sq))


def test_the_same_bits_again(cell: Cell) -> None:
    z = torch.randn(2, 16_000 if cell.slow else 200_003).to(cell.device)
    input_sq = some(cell)
    first, again = (ops.redundancy_ratio(*z, input_sq, backend=cell.backend) for _ in range(2))
    assert torch.equal(first, again)


@ON_THE_CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, dtype: torch.dtype) -> None:
    z = torch.randn(2, 300_001).to(dtype)
    input_sq = some(cell, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.redundancy_ratio(*z, input_sq, backend=cell.backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=6, **COMMON)
@given(size=st.integers(1, 5000), dtype=dtypes, seed=seeds, power=st.integers(-3, 3))
def test_symmetric_and_quadratic(cell: Cell, size, dtype, seed, power) -> None:
    """They agree to the last bit: d² does not see the sign, and powers of two are not rounded."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    z1, z2 = (
        (1 + torch.rand(size, generator=generator)).to(dtype).to(cell.device) for _ in range(2)
    )
    input_sq = torch.tensor(0.3, device=cell.device)
    ratio = check(cell, z1, z2, input_sq)
    assert torch.equal(ops.redundancy_ratio(z2, z1, input_sq, backend=cell.backend), ratio)
    factor = 2.0**power
    scaled = ops.redundancy_ratio(z1 * factor, z2 * factor, input_sq, backend=cell.backend)
    assert torch.equal(scaled, ratio * factor**2)


def test_bad_input() -> None:
    z, k = torch.ones(3, 2), torch.tensor(0.5)
    for arguments, error, match in [
        ((z.long(), z, k), TypeError, "z1 has dtype torch.int64"),
        ((z, z.to(torch.complex64), k), TypeError, "z2 has dtype torch.complex64"),
        ((z, z.to_sparse(), k), TypeError, "z2 has layout torch.sparse_coo"),
        ((z, [1.0], k), TypeError, "z2 is not a tensor but list"),
        ((z, z.double(), k), TypeError, "z1 has dtype torch.float32, z2 torch.float64"),
        ((z, z, 0.5), TypeError, "input_sq must be a 0-d floating-point tensor"),
        ((z, z, k.long()), TypeError, "input_sq must be a 0-d floating-point tensor"),
        ((z, z, torch.ones(2)), ValueError, r"input_sq must be 0-d, got shape \[2\]"),
        ((z, z[:2], k), ValueError, r"z1 has shape \[3, 2\], z2 \[2, 2\]"),
        ((z, z.view(6), k), ValueError, r"z1 has shape \[3, 2\], z2 \[6\]"),
        ((z, z.to("meta"), k), ValueError, "z2 is on meta, z1 on cpu"),
        ((z, z, k.to("meta")), ValueError, "input_sq is on meta, z1 on cpu"),
    ]:
        with pytest.raises(error, match=match):
            ops.redundancy_ratio(*arguments)
