"""joint_entropies: NumPy's counts to the last sample, and the entropies that follow from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy
import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, strided
from no_sync import no_host_sync
from numpy_bins import NUMPY_BINS_IN_FLOAT32, as_numpy, counted_dtype, related
from strategies import COMMON, dtypes, seeds
from torch import Tensor

import mmfuse.reference.joint_entropies as specification
from mmfuse import ops

PAIR_BINS = [1, 2, 3, 30, 256]
TRIPLE_BINS = [1, 2, 32]
INF, NAN = float("inf"), float("nan")


def numpys_counts(variables: Sequence[Tensor], bins: int) -> Tensor:
    """[P, bins^order], each problem by itself."""
    problems = []
    for columns in zip(*(as_numpy(x) for x in variables), strict=True):
        counts, edges = numpy.histogramdd(columns, bins)
        if any((numpy.diff(e) < 0).any() for e in edges):
            counts = counts_between_overshooting_edges(columns, edges)
        problems.append(counts)
    return torch.from_numpy(numpy.stack(problems)).to(torch.int64).flatten(1)


def counts_between_overshooting_edges(
    columns: Sequence[numpy.ndarray], edges: Sequence[numpy.ndarray]
) -> numpy.ndarray:
    """The counts in a range of few subnormals, where a step rounded up climbs past the end.

    NumPy then searches edges out of order. The right one is the last bin that begins at or
    before the value.
    """
    bins = len(edges[0]) - 1
    counts = numpy.zeros([bins] * len(edges))
    ends = zip(columns, edges, strict=True)
    numpy.add.at(counts, tuple(numpy.searchsorted(e[1:-1], x, "right") for x, e in ends), 1)
    return counts


def numpys_entropy(p: numpy.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * numpy.log(p)).sum())


def check_entropies(found: ops.JointEntropies, order: int, bins: int) -> None:
    """They belong to the counts that were returned with them; NaN where there are none."""
    q, p, cells = found.counts.shape
    assert found.entropies.shape == (q, p, 2**order - 1)
    assert cells == bins**order
    expected = torch.full((q, p, 2**order - 1), NAN, dtype=torch.float64)
    bounds = torch.zeros_like(expected)
    for i, j in itertools.product(range(q), range(p)):
        counts = found.counts[i, j].cpu().numpy().reshape([bins] * order)
        if not counts.any():
            continue
        for k in range(2**order - 1):
            others = tuple(axis for axis in range(order) if not (k + 1) >> axis & 1)
            margin = counts.sum(others)
            expected[i, j, k] = numpys_entropy(margin / margin.sum())
            bounds[i, j, k] = tolerances.entropy(torch.from_numpy(margin))
    assert float(bounds.max()) < 1e-12
    tolerances.assert_within(found.entropies, expected, bounds, f"entropies of {bins} bins")
    assert not bool((found.entropies < 0).any())


def check(
    cell: Cell,
    data: Sequence[Tensor],
    tuples: Sequence[Sequence[int]],
    bins: int,
    expected: Tensor | None = None,
) -> ops.JointEntropies:
    """Compares with NumPy, and with the reference where NumPy is too old."""
    before = [x.clone() for x in data]
    found = ops.joint_entropies(data, tuples, bins, backend=cell.backend)
    for x, copy in zip(data, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    order, device = len(tuples[0]), data[0].device
    assert (found.counts.dtype, found.counts.device) == (torch.int64, device)
    assert (found.entropies.dtype, found.entropies.device) == (torch.float64, device)
    assert found.counts.is_contiguous() and found.entropies.is_contiguous()
    if expected is None:
        expected = expected_counts(data, tuples, bins)
    actual = found.counts.cpu()
    assert actual.shape == expected.shape
    wrong = int((actual != expected).sum())
    assert not wrong, f"{wrong} of {actual.numel()} cells differ, {bins} bins, {data[0].dtype}"
    check_entropies(found, order, bins)
    return found


def expected_counts(data: Sequence[Tensor], tuples: Sequence[Sequence[int]], bins: int) -> Tensor:
    wide = counted_dtype(max((x.dtype for x in data), key=lambda d: d == torch.float64))
    data = [x.detach().cpu().to(wide) for x in data]
    if wide == torch.float64 or NUMPY_BINS_IN_FLOAT32:
        return torch.stack([numpys_counts([data[k] for k in t], bins) for t in tuples])
    flat = [k for t in tuples for k in t]
    return specification.joint_entropies(data, flat, len(tuples[0]), bins)[1]


PAIRS = [(0, 1), (1, 2)]


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", PAIR_BINS)
def test_pairs(cell: Cell, dtype: torch.dtype, bins: int) -> None:
    shapes = [(1, 1), (3, 2), (2, 33), (5, 257)]
    if not cell.slow:
        shapes += [(1, 5003), (37, 10)]
    for shape in shapes if bins < 256 else shapes[2:4]:
        check(cell, related(shape, dtype, cell.device), PAIRS, bins)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", TRIPLE_BINS)
def test_triples(cell: Cell, dtype: torch.dtype, bins: int) -> None:
    for shape in [(1, 1), (2, 33), (3, 257)] if bins < 32 else [(2, 300)]:
        check(cell, related(shape, dtype, cell.device), [(0, 1, 2), (2, 0, 1)], bins)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 40_001), (2, 16_385), (600, 3)], ids=str)
def test_long_rows_and_many_problems(cell: Cell, shape: tuple[int, int]) -> None:
    if cell.slow or (cell == Cell("cuda", "cpu") and shape[0] > 500):
        pytest.skip("takes the interpreter, and the host shim of the CUDA kernels, long")
    check(cell, related(shape, torch.float32, cell.device)[:2], [(0, 1)], 7)


def test_more_problems_than_a_wave_of_blocks(cell: Cell) -> None:
    """Small ones, each compared with NumPy's on its own."""
    problems = 40 if cell.slow else 150
    check(cell, related((problems, 6), torch.float32, cell.device)[:2], [(0, 1)], 4)


def test_every_variable_in_several_tuples(cell: Cell) -> None:
    data = related((2, 60), torch.float32, cell.device) + related((2, 60), torch.float32, "cpu")
    data = [x.to(cell.device) for x in data]
    pairs = [*itertools.combinations(range(6), 2), (5, 0), (3, 3)]
    check(cell, data, pairs, 5)
    check(cell, data, [*itertools.combinations(range(4), 3), (4, 4, 1), (2, 2, 2)], 3)


def test_variables_that_no_tuple_names(cell: Cell) -> None:
    data = related((2, 60), torch.float64, cell.device)
    data[1].fill_(NAN)
    found = check(cell, data, [(2, 0)], 5, expected_counts(data, [(2, 0)], 5))
    assert bool(found.entropies.isfinite().all())


def test_the_first_variable_is_the_slowest_index(cell: Cell) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0]], device=cell.device)
    y = torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=cell.device)
    z = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=cell.device)
    found = check(cell, [x, y], [(0, 1), (1, 0)], 2)
    assert found.counts.tolist() == [[[1, 2, 0, 1]], [[1, 0, 2, 1]]]
    found = check(cell, [x, y, z], [(0, 1, 2)], 2)
    assert found.counts.tolist() == [[[1, 0, 1, 1, 0, 0, 1, 0]]]
    quarter = numpys_entropy(numpy.array([0.25, 0.75]))
    assert found.entropies[0, 0, [0, 1, 3]].tolist() == pytest.approx([quarter] * 3, abs=1e-15)
    assert float(found.entropies[0, 0, 2]) == pytest.approx(1.5 * numpy.log(2), abs=1e-15)


# The smallest numbers above zero.
SMALLEST = tolerances.UNDERFLOW


def special(kind: str, count: int, dtype: torch.dtype) -> Tensor:
    """[2, count] values at which a bin found by a division alone is wrong."""
    limits = torch.finfo(dtype)
    noise = torch.randn(2, count, dtype=torch.float64)
    values = {
        "integers": torch.randint(-7, 9, (2, count)).double(),
        "few distinct": torch.randint(0, 3, (2, count)).double() / 3,
        "constant": torch.tensor([[3.25], [0.0]]).double().expand(2, count),
        "large constant": limits.max / 4 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        "few ulps": 1 + torch.randint(0, 6, (2, count)).double() * limits.eps,
        "ulps around zero": torch.randint(-2, 3, (2, count)).double() * limits.tiny,
        "two ulps far off": -4096 - torch.randint(0, 3, (2, count)).double() * 4096 * limits.eps,
        "three denormals": torch.randint(0, 3, (2, count)).double() * SMALLEST[dtype],
        "hundreds of denormals": torch.randint(0, 401, (2, count)).double() * SMALLEST[dtype],
        "large": noise.clamp(-3, 3) * (limits.max / 8),
        "1e30": noise * 1e30,
        "skewed": (4 * noise).clamp(max=11).exp(),
        "offset": noise / 16 + 1000,
    }[kind]
    return values.expand(2, count).to(dtype)


KINDS = [
    *("integers", "few distinct", "constant", "large constant", "few ulps", "ulps around zero"),
    *(
        "two ulps far off",
        "three denormals",
        "hundreds of denormals",
        "large",
        "1e30",
        "skewed",
        "offset",
    ),
]


@pytest.mark.slow_except_on("reference", "cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(cell: Cell, dtype: torch.dtype, kind: str) -> None:
    if kind == "1e30" and dtype == torch.float16:
        pytest.skip("float16 ends at 65,504")
    x = special(kind, 400, dtype).to(cell.device)
    y = torch.randn(2, 400).to(dtype).to(cell.device)
    for bins in (1, 3, 30) if cell.slow else (1, 2, 3, 7, 30, 100, 256):
        check(cell, [x, y], [(0, 1)], bins)
    for bins in (2, 7) if cell.slow else (1, 2, 7, 32):
        check(cell, [y, x, x.flip(1)], [(0, 1, 2)], bins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", [2, 3, 7, 30, 49, 256])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.3, 0.1), (1e-3, 1e5), (0.1, 0.7)], ids=str)
def test_values_on_the_edges_and_next_to_them(
    cell: Cell, dtype: torch.dtype, bins: int, ends: tuple[float, float]
) -> None:
    """Every edge, and its neighbours on either side."""
    if cell.slow and bins > 49:
        pytest.skip("takes the interpreter long")
    low, high = torch.tensor(ends, dtype=dtype)
    edges = specification.bin_edges(low[None], high[None], bins)[0]
    near = [edges, edges.nextafter(low), edges.nextafter(high), edges.nextafter(edges)]
    x = torch.cat(near)[None]
    assert bool(((x >= low) & (x <= high)).all())
    y = x.flip(1).contiguous()
    found = check(cell, [x.to(cell.device), y.to(cell.device)], [(0, 1)], bins)
    margin = found.counts[0, 0].view(bins, bins).sum(1).tolist()
    # Closed on the left: an edge, its repetition and its right neighbour, and the left neighbour
    # of the next edge; the first bin lacks a left neighbour of its own, the last has two edges.
    assert margin == [5, *[4] * (bins - 2), 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_counts_as_float32(cell: Cell, dtype: torch.dtype) -> None:
    data = [x.to(dtype) for x in related((2, 200), torch.float32, cell.device)]
    one = ops.joint_entropies(data, PAIRS, 30, backend=cell.backend)
    other = ops.joint_entropies([x.float() for x in data], PAIRS, 30, backend=cell.backend)
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.entropies, other.entropies)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(DTYPES, 2)), ids=str)
def test_mixed_dtypes_are_promoted(cell: Cell, first: torch.dtype, second: torch.dtype) -> None:
    x, y, _ = related((2, 100), torch.float32, cell.device)
    check(cell, [x.to(first), y.to(second)], [(0, 1), (1, 0)], 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [1, 7])
def test_non_finite_empties_its_tuples_and_problems_only(
    cell: Cell, dtype: torch.dtype, bins: int
) -> None:
    for value, variable, problem, where in (
        (NAN, 0, 0, 0),
        (INF, 1, 2, 40),
        (-INF, 2, 1, 20),
        (NAN, 1, 1, 40),
    ):
        data = related((3, 41), dtype, cell.device)
        expected = {
            2: expected_counts(data, [*PAIRS, (2, 0)], bins),
            3: expected_counts(data, [(0, 1, 2), (0, 0, 2)], bins),
        }
        data[variable][problem, where] = value
        for order, tuples in ((2, [*PAIRS, (2, 0)]), (3, [(0, 1, 2), (0, 0, 2)])):
            bad = torch.zeros(len(tuples), 3, dtype=torch.bool)
            for q, members in enumerate(tuples):
                bad[q, problem] = variable in members
            expected[order][bad] = 0
            found = check(cell, data, tuples, bins, expected[order])
            nan = found.entropies.isnan().cpu()
            assert torch.equal(nan, bad[..., None].expand_as(nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_range_that_overflows_counts_nothing(cell: Cell, dtype: torch.dtype) -> None:
    x, y, z = related((2, 41), dtype, cell.device)
    x[1, 3], x[1, 4] = torch.finfo(dtype).max, torch.finfo(dtype).min
    tuples = [(0, 1), (1, 2)]
    good = x.clone()
    good[1] = y[1]
    expected = expected_counts([good, y, z], tuples, 5)
    expected[0, 1] = 0
    found = check(cell, [x, y, z], tuples, 5, expected)
    assert bool(found.entropies[0, 1].isnan().all())


@pytest.mark.parametrize("order", [2, 3])
def test_constants_have_no_entropy(cell: Cell, order: int) -> None:
    x = torch.full((2, 50), 0.1, device=cell.device)
    members = tuple(range(order))
    found = check(cell, [x] * order, [members], 9)
    assert bool((found.entropies == 0).all())
    middle = sum(4 * 9**k for k in range(order))
    assert found.counts[0, :, middle].tolist() == [50, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_sample(cell: Cell, dtype: torch.dtype) -> None:
    data = related((4, 1), dtype, cell.device)
    for tuples in ([(0, 1)], [(0, 1, 2)]):
        found = check(cell, data, tuples, 4)
        assert bool((found.entropies == 0).all())
        assert found.counts.sum(-1).tolist() == [[1] * 4]


@pytest.mark.parametrize("view", list(strided("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    check(cell, strided(cell.device)[view], [(0, 1)], 6)


def test_the_same_bits_again(cell: Cell) -> None:
    data = related((3, 300), torch.float32, cell.device)
    for tuples in (PAIRS, [(0, 1, 2)]):
        one, other = (ops.joint_entropies(data, tuples, 9, backend=cell.backend) for _ in range(2))
        assert torch.equal(one.counts, other.counts)
        assert torch.equal(one.entropies, other.entropies)


@ON_THE_CPU
@pytest.mark.parametrize("shape", [(1, 300_001), (3000, 30)], ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, shape: tuple[int, int]) -> None:
    data = related(shape, torch.float32, cell.device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.joint_entropies(data, PAIRS, 8, backend=cell.backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_host_sync(cell: Cell) -> None:
    data = related((2, 50), torch.float32, cell.device)
    ops.joint_entropies(data, PAIRS, 5, backend=cell.backend)  # compiled before
    with no_host_sync(cell.device):
        found = ops.joint_entropies(data, PAIRS, 5, backend=cell.backend)
    assert int(found.counts.sum()) == 2 * 2 * 50


def test_nothing_is_differentiable(cell: Cell) -> None:
    x = torch.randn(2, 20, device=cell.device, requires_grad=True)
    found = ops.joint_entropies([x, x], [(0, 1)], 4, backend=cell.backend)
    assert not found.entropies.requires_grad and not found.counts.requires_grad


@settings(max_examples=10, **COMMON)
@given(
    problems=st.integers(1, 4),
    count=st.integers(1, 300),
    bins=st.integers(1, 32),
    dtype=dtypes,
    seed=seeds,
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    order=st.sampled_from([2, 3]),
)
def test_any_data(cell: Cell, problems, count, bins, dtype, seed, kinds, order) -> None:
    torch.manual_seed(seed % 2**63)
    if dtype == torch.float16:
        kinds = ["skewed" if kind == "1e30" else kind for kind in kinds]
    data = [special(kind, count, dtype).repeat(2, 1)[:problems].to(cell.device) for kind in kinds]
    data = [torch.where(x.isfinite(), x, 0) for x in data]  # float16 ends early
    if order == 3:
        bins = min(bins, 16)
    check(cell, data, [tuple(range(order)), tuple(range(order))[::-1]], bins)


def test_bad_input() -> None:
    x = torch.ones(2, 3)
    for arguments, error, match in [
        (([x.long(), x], [(0, 1)], 3), TypeError, r"data\[0\] has dtype torch.int64"),
        (([x, x.to(torch.complex64)], [(0, 1)], 3), TypeError, r"data\[1\] has dtype torch.compl"),
        (([x, x.to_sparse()], [(0, 1)], 3), TypeError, r"data\[1\] has layout torch.sparse_coo"),
        (([x, [1.0]], [(0, 1)], 3), TypeError, r"data\[1\] is not a tensor but list"),
        (([x, x[0]], [(0, 1)], 3), ValueError, r"data\[1\] must be \[P, N\], got \[3\]"),
        (([x[None], x], [(0, 1)], 3), ValueError, r"data\[0\] must be \[P, N\], got \[1, 2, 3\]"),
        (
            ([x, x[:, :2]], [(0, 1)], 3),
            ValueError,
            r"must have one shape: data\[0\] is \[2, 3\], data\[1\] \[2, 2\]",
        ),
        (([x, x[:1]], [(0, 1)], 3), ValueError, r"data\[1\] \[1, 3\]"),
        (([x, x.to("meta")], [(0, 1)], 3), ValueError, r"data\[1\] is on meta, data\[0\] on cpu"),
        (([x[:, :0]] * 2, [(0, 1)], 3), ValueError, r"data\[0\] is empty \(\[2, 0\]\)"),
        (([x[:0]] * 2, [(0, 1)], 3), ValueError, r"data\[0\] is empty \(\[0, 3\]\)"),
        (([x, x], [], 3), ValueError, "tuples must hold pairs or triples"),
        (([x, x], [(0,)], 3), ValueError, "tuples must hold pairs or triples"),
        (([x, x], [(0, 1, 0, 1)], 3), ValueError, "tuples must hold pairs or triples"),
        (([x, x], [(0, 1), (0, 1, 1)], 3), ValueError, "tuples must hold pairs or triples"),
        (([x, x], [(0, 1), (0, 2)], 3), ValueError, r"must index the 2 variables, got \(0, 2\)"),
        (([x, x], [(-1, 0)], 3), ValueError, r"must index the 2 variables, got \(-1, 0\)"),
        (([x, x], [(0, 1)], 0), ValueError, "bins must be from 1 to 256, got 0"),
        (([x, x], [(0, 1)], 257), ValueError, "bins must be from 1 to 256, got 257"),
        (([x, x], [(0, 1, 1)], 33), ValueError, "bins must be from 1 to 32, got 33"),
        (([x, x], [(0, 1)], 3.0), TypeError, "bins must be an integer, got float"),
        (([x, x], [(0, 1)], True), TypeError, "bins must be an integer, got bool"),
        (([x, x], [(0, 1)], torch.tensor(3)), TypeError, "bins must be an integer, got Tensor"),
    ]:
        with pytest.raises(error, match=match):
            ops.joint_entropies(*arguments)
    with pytest.raises(TypeError, match=r"^video has dtype torch.int64"):
        ops.joint_entropies([x, x.long()], [(0, 1)], 3, names=["audio", "video"])
