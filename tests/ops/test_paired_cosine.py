"""paired_cosine: every backend against float64, its gradients, and the edges of a division."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from cosines import rows_of, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, wide
from samples import BOUNDS
from strategies import COMMON, dtypes, seeds
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops
from mmfuse.reference.paired_cosine import paired_cosine as reference
from mmfuse.reference.paired_cosine import paired_cosine_backward


def features(
    batch: int, width: int, dtype: torch.dtype, device: str, *, odd_address: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows that are alike to some degree, and of very different lengths."""
    a = torch.randn(batch, width)
    b = torch.randn(batch, width) + 0.5 * a
    spread = 10.0 ** (torch.arange(batch) % 5 - 2.0).unsqueeze(1)
    out = []
    for values in (a * spread, b * spread.flip(0)):
        memory = torch.empty(batch * width + 1, dtype=dtype, device=device)
        memory = memory[1:] if odd_address else memory[:-1]
        out.append(memory.view(batch, width).copy_(values))
    return out[0], out[1]


def result_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return tolerances.accumulation_dtype(torch.promote_types(a.dtype, b.dtype))


def check(cell: Cell, a: Tensor, b: Tensor) -> Tensor:
    before = a.clone(), b.clone()
    cosine = ops.paired_cosine(a, b, backend=cell.backend)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]), "an input was written to"
    dtype = result_dtype(a, b)
    assert (cosine.dtype, cosine.shape, cosine.device) == (dtype, (), a.device)
    expected = reference(*wide([a, b]))
    (bound,) = BOUNDS["paired_cosine"]((a, b), [expected])
    tolerances.assert_within(cosine, expected, bound, f"cosine of {a.shape}")
    return cosine


def check_gradients(cell: Cell, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the gradients of weight·paired_cosine after comparing them."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    cosine = ops.paired_cosine(a, b, backend=cell.backend)
    weight = (1 + torch.rand(())).to(cosine)
    (weight * cosine).backward()
    expected = paired_cosine_backward(*wide([weight, a, b]))
    found = BOUNDS["paired_cosine_backward"]((weight, a, b), expected)
    for k, (leaf, bound) in enumerate(zip((a, b), found, strict=True)):
        assert leaf.grad.dtype == leaf.dtype
        what = f"gradient of {'ab'[k]}, {tuple(a.shape)}"
        tolerances.assert_within(leaf.grad, expected[k], bound, what)
    return a.grad, b.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cell: Cell, dtype: torch.dtype) -> None:
    for batch, width in shapes(cell):
        check(cell, *features(batch, width, dtype, cell.device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_parity(cell: Cell, dtype: torch.dtype) -> None:
    for batch, width in shapes(cell):
        check_gradients(cell, *features(batch, width, dtype, cell.device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1031, 3), (40_001, 2), (2, 40_001)], ids=str)
def test_many_rows_and_long_rows(cell: Cell, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if not cell.affordable([max(shape)]) or (cell == Cell("cuda", "cpu") and shape[0] > 2000):
        pytest.skip("takes the interpreter, and the host shim of the CUDA kernels, long")
    a, b = features(*shape, dtype, cell.device)
    check(cell, a, b)
    check_gradients(cell, a, b)


def test_is_the_formula_of_the_docstring(cell: Cell) -> None:
    a, b = features(20, 33, torch.float64, cell.device)
    a[3] *= 1e-10  # a norm that counts, and one that does not
    b[4] *= 1e-15
    expected = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()
    rows = rows_of(a, b)
    bound = tolerances.cosine(
        torch.float64, rows.cosines, rows.overlap, rows.norms[0] * rows.norms[1], 33
    )
    actual = ops.paired_cosine(a, b, backend=cell.backend)
    tolerances.assert_within(actual, expected, 2 * bound)  # each side has its own error


def test_the_gradient_is_pytorchs(cell: Cell) -> None:
    a, b = (x.requires_grad_() for x in features(20, 33, torch.float64, cell.device))
    ops.paired_cosine(a, b, backend=cell.backend).backward()
    actual = a.grad, b.grad
    a.grad = b.grad = None
    F.cosine_similarity(a, b, dim=1).mean().backward()
    rows = rows_of(a, b)
    for k, (grad, leaf) in enumerate(zip(actual, (a, b), strict=True)):
        bound = tolerances.cosine_gradient(
            torch.float64,
            leaf.grad.cpu(),
            1 / len(a) / rows.norms[k],
            rows.units[k],
            rows.units[1 - k],
            rows.cosines,
            rows.overlap,
        )
        tolerances.assert_within(grad, leaf.grad, 2 * bound)


def strided(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    a, b = torch.randn(33, 17, device=device), torch.randn(17, 33, device=device)
    return {
        "transposed": (a, b.t()),
        "both transposed": (a.t(), b),
        "columns": (torch.randn(20, 30, device=device)[:, ::2], a[:20, 1:16]),
        "rows": (torch.randn(66, 17, device=device)[1::2], a),
        "one row for all": (a, b.t()[:1].expand(33, 17)),
        "one number for a row": (a, b.t()[:, :1].expand(33, 17)),
    }


@pytest.mark.parametrize("view", list(strided("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    a, b = strided(cell.device)[view]
    check(cell, a, b)
    check_gradients(cell, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 1027)], ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    a, b = features(*shape, dtype, cell.device, odd_address=True)
    check(cell, a, b.clone())
    check_gradients(cell, a, b)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(DTYPES, 2)), ids=str)
def test_mixed_dtypes_are_promoted(cell: Cell, first: torch.dtype, second: torch.dtype) -> None:
    a = features(9, 20, first, cell.device)[0]
    b = features(9, 20, second, cell.device)[1]
    check(cell, a, b)
    a.requires_grad_()
    b.requires_grad_()
    ops.paired_cosine(a, b, backend=cell.backend).backward()
    assert (a.grad.dtype, b.grad.dtype) == (first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "other"),
    [(1e-15, 1e-15), (1e-15, 1e15), (1e-6, 1e15), (1e18, 1e18)],
    ids=str,
)
def test_extreme_magnitudes(cell: Cell, dtype: torch.dtype, size: float, other: float) -> None:
    """Squared norms up to 3e37; the product of two of them leaves float32."""
    a, b = torch.randn(2, 9, 33, dtype=torch.float64)
    a, b = ((s * x).to(dtype).to(cell.device) for s, x in ((size, a), (other, a + b)))
    check(cell, a, b)
    check_gradients(cell, a, b)


@pytest.mark.parametrize("size", [6e-8, 6e-5, 2e4], ids=str)
def test_extreme_magnitudes_of_float16(cell: Cell, size: float) -> None:
    a, b = (size * torch.randn(2, 9, 33).clamp(-3, 3)).half().to(cell.device)
    check(cell, a, b)
    if size > 1e-5:  # a smaller feature has gradients beyond 65,504
        check_gradients(cell, a, b)


def test_norms_that_overflow_count_as_infinite(cell: Cell) -> None:
    a, b = (1 + torch.rand(2, 3, 40)).to(cell.device)
    assert bool(ops.paired_cosine(1e25 * a, 1e25 * b, backend=cell.backend).isnan())
    assert ops.paired_cosine(1e25 * a, b, backend=cell.backend).tolist() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_has_cosine_and_gradient_zero(cell: Cell, dtype: torch.dtype) -> None:
    a, b = features(6, 33, dtype, cell.device)
    a[1], b[3] = 0.0, 0.0
    a[4], b[4] = 0.0, -0.0
    check(cell, a, b)
    grads = check_gradients(cell, a, b)
    for grad in grads:
        assert [bool((row == 0).all()) for row in grad] == [False, True, False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_below_the_least_norm_has_gradient_zero(cell: Cell, dtype: torch.dtype) -> None:
    """1e-15 in every element: the norm is 3e-15, less than 1e-12, but not zero."""
    a, b = features(5, 9, dtype, cell.device)
    a[2] = 1e-15
    a_grad, b_grad = check_gradients(cell, a, b)
    assert bool((a_grad[2] == 0).all())
    assert bool((b_grad[2] != 0).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_zero_rows(cell: Cell, dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 5, dtype=dtype, device=cell.device)
    assert float(check(cell, zero, zero)) == 0.0
    assert all(bool((g == 0).all()) for g in check_gradients(cell, zero, zero))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (1, 0), (5, 0)], ids=str)
def test_empty(cell: Cell, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    a, b = (torch.zeros(shape, dtype=dtype, device=cell.device).requires_grad_() for _ in range(2))
    cosine = ops.paired_cosine(a, b, backend=cell.backend)
    if shape[0]:
        assert cosine.tolist() == 0.0
    else:
        assert bool(cosine.isnan())
    cosine.backward()
    assert a.grad.shape == b.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_themselves(cell: Cell, dtype: torch.dtype) -> None:
    a = features(10, 64, dtype, cell.device)[0]
    check(cell, a, a)
    check(cell, a, -a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_comes_out_and_stays_in_its_row(cell: Cell, dtype: torch.dtype) -> None:
    a, b = features(7, 37, dtype, cell.device)
    one = torch.ones((), device=cell.device, dtype=tolerances.accumulation_dtype(dtype))
    backward = getattr(torch.ops.mmfuse.paired_cosine_backward, cell.backend)
    clean = backward(one, a, b)
    cases = [("nan", 0, (0, 0)), ("inf", 1, (0, 36)), ("-inf", 0, (3, 20)), ("nan", 1, (6, 36))]
    for value, k, (row, column) in cases:
        bad = [a.clone(), b.clone()]
        bad[k][row, column] = float(value)
        assert bool(ops.paired_cosine(*bad, backend=cell.backend).isnan())
        others = torch.arange(7, device=cell.device) != row
        for grad, untouched in zip(backward(one, *bad), clean, strict=True):
            assert bool(grad[row].isnan().all())
            assert torch.equal(grad[others], untouched[others])


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["a", "b"])
def test_gradient_of_one_side(cell: Cell, needed: tuple[bool, bool]) -> None:
    a, b = features(9, 20, torch.float32, cell.device)
    expected = getattr(torch.ops.mmfuse.paired_cosine_backward, cell.backend)(
        torch.ones((), device=cell.device), a, b
    )
    leaves = [x.requires_grad_(n) for x, n in zip((a, b), needed, strict=True)]
    ops.paired_cosine(*leaves, backend=cell.backend).backward()
    for leaf, need, grad in zip(leaves, needed, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_0d_gradient(cell: Cell, dtype: torch.dtype) -> None:
    """Autograd may hand over one element of something, or an expanded number."""
    a, b = features(4, 9, dtype, cell.device)
    backward = getattr(torch.ops.mmfuse.paired_cosine_backward, cell.backend)
    wide_type = tolerances.accumulation_dtype(dtype)
    numbers = torch.tensor([[9.0, -0.75], [9.0, 9.0]], dtype=wide_type, device=cell.device)
    expected = backward(torch.tensor(-0.75, dtype=wide_type, device=cell.device), a, b)
    for grad in (numbers[0, 1], numbers[0, 1:].expand(3)[2], numbers.t()[1, 0]):
        actual = backward(grad, a, b)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_gradcheck(cell: Cell) -> None:
    # Lengths near one: gradcheck's steps are absolute.
    a, b = torch.randn(2, 3, 2, dtype=torch.float64, device=cell.device).unbind()
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()

    def cosine(*leaves: Tensor) -> Tensor:
        return ops.paired_cosine(*leaves, backend=cell.backend)

    assert torch.autograd.gradcheck(cosine, (a, b))
    assert torch.autograd.gradcheck(lambda x: cosine(x, 2 * x + b.detach()), (a,))


def test_the_same_bits_again(cell: Cell) -> None:
    a, b = (x.requires_grad_() for x in features(65, 200, torch.float32, cell.device))
    results = []
    for _ in range(2):
        cosine = ops.paired_cosine(a, b, backend=cell.backend)
        results.append((cosine.detach(), *torch.autograd.grad(cosine, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@ON_THE_CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5000, 65), (100_000, 3), (3, 100_001)], ids=str)
def test_same_bits_for_any_number_of_threads(
    cell: Cell, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    a, b = (x.requires_grad_() for x in features(*shape, dtype, cell.device))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cosine = ops.paired_cosine(a, b, backend=cell.backend)
            results.append((cosine.detach(), *torch.autograd.grad(cosine, (a, b))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@settings(max_examples=6, **COMMON)
@given(
    batch=st.integers(1, 20),
    width=st.integers(1, 300),
    dtype=dtypes,
    seed=seeds,
    powers=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
)
def test_symmetric_and_blind_to_lengths(cell: Cell, batch, width, dtype, seed, powers) -> None:
    """They agree to the last bit: powers of two are not rounded, and products commute."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    a, b = (
        (0.1 + torch.rand(batch, width, generator=generator)).to(dtype).to(cell.device)
        for _ in range(2)
    )
    cosine = check(cell, a, b)
    assert torch.equal(ops.paired_cosine(b, a, backend=cell.backend), cosine)
    scaled = ops.paired_cosine(a * 2.0 ** powers[0], b * 2.0 ** powers[1], backend=cell.backend)
    assert torch.equal(scaled, cosine)
    assert torch.equal(ops.paired_cosine(-a, b, backend=cell.backend), -cosine)


def test_bad_input() -> None:
    z = torch.ones(3, 2)
    for arguments, error, match in [
        ((z.long(), z), TypeError, "a has dtype torch.int64"),
        ((z, z.to(torch.complex64)), TypeError, "b has dtype torch.complex64"),
        ((z, z.to_sparse()), TypeError, "b has layout torch.sparse_coo"),
        ((z, [1.0]), TypeError, "b is not a tensor but list"),
        ((z[0], z[0]), ValueError, r"a must be \[B, D\], got \[2\]"),
        ((z, z[None]), ValueError, r"b must be \[B, D\], got \[1, 3, 2\]"),
        ((z, z[:2]), ValueError, r"must have one shape: a is \[3, 2\], b \[2, 2\]"),
        ((z, z[:, :1]), ValueError, r"must have one shape: a is \[3, 2\], b \[3, 1\]"),
        ((z, z.to("meta")), ValueError, "b is on meta, a on cpu"),
    ]:
        with pytest.raises(error, match=match):
            ops.paired_cosine(*arguments)
