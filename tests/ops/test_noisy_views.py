"""noisy_views: the noise contract, the distance of the views as they are stored, gradients."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import CHUNK_EDGES, DTYPES, SIZES, gradients, strided_views, wide
from strategies import COMMON, dtypes, seeds
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.reference.noisy_views import noisy_views as reference

FEW_SIZES = [1, 5, 8, 33, 1025]


def noise_of(x: Tensor, stream: NoiseStream) -> list[Tensor]:
    """The noise that both views must have drawn, in float64 on the CPU."""
    ids, offsets = stream.counters(2)
    return [
        stream.normal(x.numel(), i, o, dtype=torch.float64).cpu().view(x.shape)
        for i, o in zip(ids, offsets, strict=True)
    ]


def check(
    cell: Cell, x: Tensor, sigma: float, stream: NoiseStream, noise: list[Tensor] | None = None
) -> ops.NoisyViews:
    """`noise` is that of an element range which starts where x does: it takes long to compute."""
    before, state = x.clone(), stream.state.clone()
    views = ops.noisy_views(x, sigma, stream, backend=cell.backend)
    assert torch.equal(x, before), "x was written to"
    assert torch.equal(stream.state, state), "the stream was advanced"
    exact, std = wide([x])[0], torch.tensor(sigma, dtype=torch.float64)
    for k, z in enumerate(noise or noise_of(x, stream)):
        z = z.flatten()[: x.numel()].view(x.shape)
        view, expected = views[k], exact + sigma * z
        assert (view.dtype, view.shape, view.device) == (x.dtype, x.shape, x.device)
        assert view.is_contiguous()
        bound = tolerances.noisy_view(x.dtype, expected, exact, std, z)
        tolerances.assert_within(view, expected, bound, f"view {k} of {tuple(x.shape)}")
    check_distance(views)
    return views


def check_distance(views: ops.NoisyViews) -> None:
    """input_sq belongs to the views that were returned, not to those before rounding."""
    first, second = wide(views[:2])
    dtype = tolerances.accumulation_dtype(views.first.dtype)
    assert (views.input_sq.dtype, views.input_sq.shape) == (dtype, ())
    expected = (first - second).square().mean()
    bound = tolerances.mean_square_difference(dtype, expected, first.numel())
    tolerances.assert_within(
        views.input_sq, expected, bound, f"input_sq of {tuple(views.first.shape)}"
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cell: Cell, dtype: torch.dtype) -> None:
    stream = NoiseStream(2**63 + 5, cell.device)
    stream.advance(3)
    sizes = cell.affordable(SIZES + CHUNK_EDGES)
    if cell.slow:
        sizes = [*SIZES[::2], 4095, 4097] if dtype == torch.float32 else FEW_SIZES
    if cell.backend == "reference":
        sizes = SIZES  # it has no chunks
    tensors = gradients(sizes, dtype, cell.device)
    noise = noise_of(tensors[-1], stream)
    for i, x in enumerate(tensors):
        check(cell, x, (0.03, 0.7, 2.0)[i % 3], stream, noise)


@pytest.mark.parametrize("shape", [(63,), (7, 9)], ids=str)
def test_agrees_with_the_reference_in_float64(cell: Cell, shape: tuple[int, ...]) -> None:
    """The ids are 0 and 1, of a stream that is not placed."""
    stream = NoiseStream(4, cell.device)
    x = torch.randn(shape, dtype=torch.float64, device=cell.device)
    views = check(cell, x, 0.5, stream)
    expected = reference(wide([x])[0], 0.5, stream.state.cpu(), [0, 1], [0, 0])
    for k in (0, 1):
        z = stream.normal(63, k, dtype=torch.float64).cpu().view(shape)
        tolerances.assert_within(views[k], expected[k], 0.5 * tolerances.noise(z))
    assert not torch.equal(views.first, views.second)


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ((5, 0), (0, 0)),
        ((5, 5), (1, 2)),
        ((0, 1), (3, 5)),
        ((2**32 - 1, 7), (4, 8)),
        ((3, 2**31), (2**31 + 5, 1_000_003)),
        ((7, 8), (6, 2**40 + 1)),
    ],
    ids=str,
)
def test_placed_streams(cell: Cell, ids: tuple[int, int], offsets: tuple[int, int]) -> None:
    stream = NoiseStream(-7, cell.device).place(ids, offsets)
    check(cell, torch.randn(1001).to(cell.device), 0.7, stream)


def test_the_same_place_gives_the_same_view(cell: Cell) -> None:
    stream = NoiseStream(1, cell.device).place([3, 3], [6, 6])
    views = ops.noisy_views(torch.randn(500).to(cell.device), 2.0, stream, backend=cell.backend)
    assert torch.equal(views.first, views.second)
    assert float(views.input_sq) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_gets_the_numbers_of_the_whole(cell: Cell, dtype: torch.dtype) -> None:
    x = torch.randn(1002).to(dtype).to(cell.device)
    stream = NoiseStream(8, cell.device).place([2, 9], [0, 5])
    whole = ops.noisy_views(x, 0.5, stream, backend=cell.backend)
    for start in (1, 2, 3) if dtype == torch.float32 else (999,):
        shard = stream.place([2, 9], [start, 5 + start])
        part = ops.noisy_views(x[start:], 0.5, shard, backend=cell.backend)
        exact = wide([x[start:]])[0]
        std = torch.tensor(0.5, dtype=torch.float64)
        for k, z in enumerate(noise_of(exact, shard)):
            expected = whole[k][start:]
            bound = tolerances.shard_of_noisy_view(dtype, exact, std, z)
            tolerances.assert_within(part[k], expected, bound, f"view {k} from {start}")


def test_each_step_draws_other_numbers_and_repeats_its_own(cell: Cell) -> None:
    x, stream = torch.randn(300).to(cell.device), NoiseStream(5, cell.device)
    first = ops.noisy_views(x, 0.1, stream, backend=cell.backend)
    again = ops.noisy_views(x, 0.1, stream, backend=cell.backend)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    stream.advance()
    later = check(cell, x, 0.1, stream)
    assert not torch.equal(first.first, later.first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_noise_the_views_are_copies(cell: Cell, dtype: torch.dtype) -> None:
    x = gradients([1027], dtype, cell.device)[0]
    views = ops.noisy_views(x, 0.0, NoiseStream(1, cell.device), backend=cell.backend)
    assert torch.equal(views.first, x) and torch.equal(views.second, x)
    assert len({t.data_ptr() for t in (x, views.first, views.second)}) == 3
    assert float(views.input_sq) == 0.0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)], ids=str)
def test_empty(cell: Cell, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=cell.device)
    views = ops.noisy_views(x, 0.1, NoiseStream(1, cell.device), backend=cell.backend)
    assert views.first.shape == views.second.shape == shape
    assert bool(views.input_sq.isnan())


def test_a_single_number(cell: Cell) -> None:
    check(cell, torch.randn((), device=cell.device), 0.1, NoiseStream(1, cell.device))


@pytest.mark.parametrize("view", list(strided_views("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    """The noise follows the logical order of the elements, not that of the memory."""
    stream = NoiseStream(6, cell.device).place([4, 2], [3, 1])
    check(cell, strided_views(cell.device)[view], 0.4, stream)


def test_expanded(cell: Cell) -> None:
    x = torch.randn(5, 1, device=cell.device).expand(5, 33)
    check(cell, x, 0.4, NoiseStream(6, cell.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype) -> None:
    for x in gradients([5, 1027], dtype, cell.device, odd_address=True):
        check(cell, x, 0.4, NoiseStream(6, cell.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-15, 1e15], ids=str)
def test_extreme_magnitudes(cell: Cell, dtype: torch.dtype, size: float) -> None:
    limits = torch.finfo(dtype)
    size = min(max(size, limits.tiny), limits.max / 256)
    x = (size * torch.randn(1001, dtype=torch.float64)).to(dtype).to(cell.device)
    for relative in (1e-3, 10.0):
        views = check(cell, x, size * relative, NoiseStream(2, cell.device))
        assert bool(views.input_sq.isfinite())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_stays_in_its_element(cell: Cell, dtype: torch.dtype) -> None:
    x = gradients([1501], dtype, cell.device)[0]
    stream = NoiseStream(9, cell.device)
    clean = ops.noisy_views(x, 0.3, stream, backend=cell.backend)
    for value, where in (("inf", 0), ("nan", 700), ("-inf", 1500)):
        bad = x.clone()
        bad[where] = float(value)
        views = ops.noisy_views(bad, 0.3, stream, backend=cell.backend)
        others = torch.arange(1501, device=cell.device) != where
        for view, untouched in zip(views[:2], clean[:2], strict=True):
            assert torch.equal(view[others], untouched[others])
            torch.testing.assert_close(view[where], bad[where], rtol=0, atol=0, equal_nan=True)
        assert bool(views.input_sq.isnan())  # Inf − Inf is NaN too


def test_the_distance_is_twice_the_variance(cell: Cell) -> None:
    count = 16_000 if cell.slow else 50_000
    x = torch.randn(count).to(cell.device)
    views = ops.noisy_views(x, 0.25, NoiseStream(12345, cell.device), backend=cell.backend)
    # A mean of n squared deviates has the relative standard deviation √(2/n); five are allowed.
    assert float(views.input_sq) == pytest.approx(2 * 0.25**2, rel=5 * (2 / count) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["first", "second", "both"])
def test_gradient_is_that_of_the_views(cell: Cell, dtype: torch.dtype, used: str) -> None:
    x = torch.randn(9, 14, device=cell.device).to(dtype).t().requires_grad_()
    views = ops.noisy_views(x, 0.5, NoiseStream(3, cell.device), backend=cell.backend)
    weights = [torch.randn(14, 9).to(dtype).to(cell.device) for _ in range(2)]
    chosen = {"first": [0], "second": [1], "both": [0, 1]}[used]
    torch.autograd.backward([views[k] for k in chosen], [weights[k] for k in chosen])
    assert x.grad.dtype == dtype
    # Two numbers of one type: their sum is rounded once, by PyTorch.
    assert torch.equal(x.grad, sum(weights[k] for k in chosen[1:]) + weights[chosen[0]])
    assert not views.input_sq.requires_grad


def test_gradcheck(cell: Cell) -> None:
    x = torch.randn(1, dtype=torch.float64, device=cell.device, requires_grad=True)
    stream = NoiseStream(3, cell.device)

    def products(value: Tensor) -> Tensor:
        first, second, _ = ops.noisy_views(value, 0.5, stream, backend=cell.backend)
        return first * second

    assert torch.autograd.gradcheck(products, x)
    assert torch.autograd.gradgradcheck(products, x)


@ON_THE_CPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, dtype: torch.dtype) -> None:
    x = torch.randn(300_001).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.noisy_views(x, 0.1, NoiseStream(1), backend=cell.backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pytorchs_generators_are_not_touched(cell: Cell) -> None:
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    x, stream = torch.randn(100).to(cell.device), NoiseStream(1, cell.device)
    before = states()
    ops.noisy_views(x, 0.1, stream, backend=cell.backend)
    for now, then in zip(states(), before, strict=True):
        assert torch.equal(now, then)


@settings(max_examples=6, **COMMON)
@given(
    size=st.integers(0, 3000),
    dtype=dtypes,
    seed=seeds,
    ids=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    offsets=st.tuples(*[st.integers(0, 2**33)] * 2),
    sigma=st.floats(0.0, 10.0),
)
def test_any_size_and_place(cell: Cell, size, dtype, seed, ids, offsets, sigma) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(size, generator=generator).to(dtype).to(cell.device)
    check(cell, x, sigma, NoiseStream(seed, cell.device).place(ids, offsets))


def test_bad_input() -> None:
    x, stream = torch.ones(3), NoiseStream(0)
    for arguments, error, match in [
        ((x.long(), 0.1, stream), TypeError, "x has dtype torch.int64"),
        ((x.to(torch.complex64), 0.1, stream), TypeError, "x has dtype torch.complex64"),
        ((x.to_sparse(), 0.1, stream), TypeError, "x has layout torch.sparse_coo"),
        (([1.0], 0.1, stream), TypeError, "x is not a tensor but list"),
        ((x, 0.1, None), TypeError, "stream must be a mmfuse.NoiseStream, got NoneType"),
        ((x, 0.1, stream.state), TypeError, "stream must be a mmfuse.NoiseStream, got Tensor"),
        ((x, -0.1, stream), ValueError, "sigma must be a finite number of at least 0, got -0.1"),
        ((x, float("nan"), stream), ValueError, "sigma must be a finite number"),
        ((x, float("inf"), stream), ValueError, "sigma must be a finite number"),
        ((x, 0.1, stream.place([0])), ValueError, "placed for 1 tensors, not 2"),
        ((x, 0.1, stream.place([0, 1, 2])), ValueError, "placed for 3 tensors, not 2"),
    ]:
        with pytest.raises(error, match=match):
            ops.noisy_views(*arguments)
