"""shared_information: NumPy's counts, and what follows from their entropies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy
import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from inputs import DTYPES, strided
from no_sync import no_host_sync
from numpy_bins import NUMPY_BINS_IN_FLOAT32, as_numpy
from peaks import megabytes
from torch import Tensor

from mmfuse import ops
from mmfuse.reference.shared_information import normalised

NAN = float("nan")


def numpys_entropy(rows: Sequence[numpy.ndarray], bins: int) -> tuple[float, float]:
    """The joint entropy of these variables, and how far it may be off."""
    counts, _ = numpy.histogramdd(rows, bins)
    p = counts[counts > 0] / counts.sum()
    return -float((p * numpy.log(p)).sum()), float(tolerances.entropy(torch.from_numpy(counts)))


def numpys_share(
    m: numpy.ndarray, c: numpy.ndarray, given: list[numpy.ndarray], bins: int
) -> tuple[float, float]:
    """2 I(m; c | given) over the sum of both entropies, and how far it may be off."""
    h_m, h_c, h_mc, h_given = (
        numpys_entropy([*rows, *given], bins) if rows or given else (0.0, 0.0)
        for rows in ([m], [c], [m, c], [])
    )
    total = h_m[0] + h_c[0] - 2 * h_given[0]
    if total < 1e-12:
        return 0.0, 0.0
    share = 2 * (h_m[0] + h_c[0] - h_mc[0] - h_given[0]) / total
    bound = max(h_m[1], h_c[1], h_mc[1], h_given[1])
    return share, float(tolerances.normalised_information(torch.tensor(bound), torch.tensor(total)))


def check(
    cell: Cell, data: Sequence[Tensor], target: Tensor, bins: int, conditional_bins: int
) -> ops.SharedInformation:
    """Compares each number with NumPy's."""
    before = [x.clone() for x in (*data, target)]
    found = ops.shared_information(data, target, bins, conditional_bins, backend=cell.backend)
    for x, copy in zip((*data, target), before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    count, problems = len(data), target.shape[0]
    assert found.nmi.shape == (count, problems)
    assert found.ncmi.shape == (count, count, problems)
    for x in found:
        assert (x.dtype, x.device, x.is_contiguous()) == (torch.float64, target.device, True)
    wide = [torch.float64 if any(x.dtype == torch.float64 for x in (*data, target)) else x.dtype]
    rows = [as_numpy(x.to(wide[0])) for x in (*data, target)]
    for p in range(problems):
        *each, c = (x[p] for x in rows)
        for m, x in enumerate(each):
            near(found.nmi[m, p], *numpys_share(x, c, [], bins))
            assert found.ncmi[m, m, p] == 0
        for m, j in itertools.permutations(range(count), 2):
            want = numpys_share(each[m], c, [each[j]], conditional_bins)
            near(found.ncmi[m, j, p], *want)
    return found


def near(found: Tensor, expected: float, bound: float) -> None:
    assert bound < 1e-9
    assert 0 <= float(found) <= 1
    assert abs(float(found) - expected) <= bound


def features(count: int, shape: tuple[int, int], dtype: torch.dtype, cell: Cell) -> list[Tensor]:
    """Variables that share something, every other one after a ReLU; then a target."""
    common = torch.randn(shape, dtype=torch.float64)
    found = [
        (common + (0.5 + 0.3 * k) * torch.randn(shape, dtype=torch.float64)) for k in range(count)
    ]
    found = [10.0 ** (k - 1) * (x.relu() if k % 2 else x + k) for k, x in enumerate(found)]
    found.append(common + 0.7 * torch.randn(shape, dtype=torch.float64))
    return [x.to(dtype).to(cell.device) for x in found]


needs_numpy_2 = pytest.mark.skipif(
    not NUMPY_BINS_IN_FLOAT32, reason="before NumPy 2 a float32 histogram has float64 edges"
)


@needs_numpy_2
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bins", [(30, 2), (5, 3), (1, 1), (2, 5)], ids=str)
def test_is_numpys(cell: Cell, dtype: torch.dtype, bins: tuple[int, int]) -> None:
    for count, shape in [(2, (1, 257)), (3, (2, 33))]:
        *data, target = features(count, shape, dtype, cell)
        check(cell, data, target, *bins)


@needs_numpy_2
def test_one_variable_and_four(cell: Cell) -> None:
    """With three variables and more, a wrong index shows."""
    *data, target = features(4, (2, 60), torch.float32, cell)
    found = check(cell, data, target, 7, 3)
    assert len(set(found.ncmi[..., 0].flatten().tolist())) == 4 * 3 + 1
    one = check(cell, data[:1], target, 7, 3)
    assert torch.equal(one.nmi, found.nmi[:1])


@needs_numpy_2
@pytest.mark.usefixtures("poisoned")
def test_long_rows_and_many_problems(cell: Cell) -> None:
    if cell.slow:
        pytest.skip("takes the interpreter long")
    for shape in [(1, 40_001), (2, 16_385), (70, 9)]:
        *data, target = features(2, shape, torch.float32, cell)
        check(cell, data, target, 9, 2)


@needs_numpy_2
@pytest.mark.usefixtures("poisoned")
def test_more_problems_than_a_program_has(cell: Cell) -> None:
    """Triton's have 64; each pair of variables is where it belongs in all of them."""
    *data, target = features(3, (130, 7), torch.float32, cell)
    check(cell, data, target, 4, 2)


def test_tables_of_which_only_one_needs_ranges(cell: Cell) -> None:
    """On a GPU one of the two fits a block's shared memory, whichever it is."""
    if cell.slow:
        pytest.skip("takes the interpreter long")
    *data, target = features(2, (2, 300), torch.float32, cell)
    for bins in ((256, 2), (2, 32)):
        check(cell, data, target, *bins)


def test_is_the_ops_on_pairs_and_triples(cell: Cell) -> None:
    """The docstring says so; those ops' results are float32."""
    *data, target = features(3, (2, 90), torch.float32, cell)
    found = ops.shared_information(data, target, 8, 3, backend=cell.backend)
    for m, x in enumerate(data):
        alone = ops.mutual_information(x, target, 8, backend=cell.backend).nmi
        torch.testing.assert_close(found.nmi[m].float(), alone, rtol=1e-6, atol=1e-7)
        for j, other in enumerate(data):
            if j == m:
                continue
            given = ops.conditional_mutual_information(x, target, other, 3, backend=cell.backend)
            torch.testing.assert_close(found.ncmi[m, j].float(), given.ncmi, rtol=1e-6, atol=1e-7)


def test_copies_and_constants(cell: Cell) -> None:
    x = torch.randn(1, 50, device=cell.device)
    constant = torch.full_like(x, 3.0)
    found = ops.shared_information([x, x, constant], x, 6, 3, backend=cell.backend)
    assert found.nmi.flatten().tolist() == pytest.approx([1, 1, 0], abs=1e-14)
    # Given its copy x is known; given a constant it shares all of itself.
    expected = [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(
        found.ncmi[..., 0].cpu(), torch.tensor(expected).double(), rtol=0, atol=1e-14
    )
    alone = ops.shared_information([constant], constant, 6, 3, backend=cell.backend)
    assert alone.nmi.tolist() == [[0.0]]


def test_values_that_are_not_finite(cell: Cell) -> None:
    """Only the problem's own numbers, and only those that the variable is part of."""
    *data, target = features(3, (2, 40), torch.float32, cell)
    good = ops.shared_information(data, target, 5, 2, backend=cell.backend)
    for value in (NAN, float("inf")):
        broken = [x.clone() for x in data]
        broken[1][0, 7] = value
        found = ops.shared_information(broken, target, 5, 2, backend=cell.backend)
        assert found.nmi[:, 0].isnan().tolist() == [False, True, False]
        names = [[False, True, False], [True, True, True], [False, True, False]]
        assert found.ncmi[..., 0].isnan().tolist() == names
        assert torch.equal(found.nmi[:, 1], good.nmi[:, 1])
        assert torch.equal(found.ncmi[..., 1], good.ncmi[..., 1])
        spoilt = target.clone()
        spoilt[1, 0] = value
        found = ops.shared_information(data, spoilt, 5, 2, backend=cell.backend)
        assert bool(found.nmi[:, 1].isnan().all()) and torch.equal(found.nmi[:, 0], good.nmi[:, 0])


@pytest.mark.parametrize("view", list(strided("cpu")))
def test_strided_and_mixed(cell: Cell, view: str) -> None:
    a, b = strided(cell.device)[view]
    found = ops.shared_information([a, b.half()], b, 6, 2, backend=cell.backend)
    same = [a.contiguous(), b.half().to(b.dtype).contiguous(), b.contiguous()]
    expected = ops.shared_information(same[:2], same[2], 6, 2, backend=cell.backend)
    assert torch.equal(found.nmi, expected.nmi) and torch.equal(found.ncmi, expected.ncmi)


@ON_THE_CPU
@pytest.mark.parametrize("shape", [(1, 300_001), (3000, 30)], ids=str)
def test_same_bits_for_any_number_of_threads(cell: Cell, shape: tuple[int, int]) -> None:
    *data, target = features(2, shape, torch.float32, cell)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.shared_information(data, target, 8, 2, backend=cell.backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_host_sync(cell: Cell) -> None:
    *data, target = features(2, (2, 50), torch.float32, cell)
    ops.shared_information(data, target, 5, 2, backend=cell.backend)  # compiled before
    with no_host_sync(cell.device):
        found = ops.shared_information(data, target, 5, 2, backend=cell.backend)
    assert bool(found.nmi.isfinite().all())


def test_compiled(cell: Cell) -> None:
    """The one graph gives what the eager call gives."""
    if cell.slow:
        pytest.skip("the interpreter is not compiled")
    *data, target = features(2, (1, 40), torch.float32, cell)

    def call(data: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.shared_information(data, target, 5, 2, backend=cell.backend))

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(data, target)
    for one, other in zip(found, call(data, target), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_differentiable(cell: Cell) -> None:
    x = torch.randn(2, 20, device=cell.device, requires_grad=True)
    found = ops.shared_information([x, x * 2], x, 4, 2, backend=cell.backend)
    assert not found.nmi.requires_grad and not found.ncmi.requires_grad


def test_normalised() -> None:
    """The quotient of two rounding errors says nothing."""
    twice = torch.tensor([1.0, 1e-16, -1e-16, 3.0, NAN], dtype=torch.float64)
    total = torch.tensor([4.0, 2e-16, 1.0, 2.0, NAN], dtype=torch.float64)
    found = normalised(twice, total).tolist()
    assert found[:4] == [0.25, pytest.approx(0, abs=1e-15), 0.0, 1.0] and found[4] != found[4]


def test_bad_input() -> None:
    x = torch.ones(2, 3)
    for arguments, error, match in [
        (([], x, 3, 2), ValueError, "data must hold at least one variable"),
        (([x.long()], x, 3, 2), TypeError, r"data\[0\] has dtype torch.int64"),
        (([x], x.to_sparse(), 3, 2), TypeError, "target has layout torch.sparse_coo"),
        (([x, x[0]], x, 3, 2), ValueError, r"data\[1\] must be \[P, N\], got \[3\]"),
        (([x], x[:, :2], 3, 2), ValueError, r"data\[0\] is \[2, 3\], target \[2, 2\]"),
        (([x], x.to("meta"), 3, 2), ValueError, "target is on meta, data.0. on cpu"),
        (([x[:, :0]], x[:, :0], 3, 2), ValueError, r"data\[0\] is empty \(\[2, 0\]\)"),
        (([x], x, 257, 2), ValueError, "^bins must be from 1 to 256, got 257"),
        (([x], x, 3, 33), ValueError, "^conditional_bins must be from 1 to 32, got 33"),
        (([x], x, 3.0, 2), TypeError, "^bins must be an integer, got float"),
        (([x], x, 3, True), TypeError, "^conditional_bins must be an integer, got bool"),
    ]:
        with pytest.raises(error, match=match):
            ops.shared_information(*arguments)
    with pytest.raises(TypeError, match=r"^fused has dtype torch.int64"):
        ops.shared_information([x], x.long(), 3, 2, names=["audio", "fused"])


@ON_THE_CPU
def test_many_problems_are_counted_in_parts(cell: Cell) -> None:
    data = [torch.rand(250, 40) for _ in range(6)]
    found = ops.shared_information(data[:5], data[5], 8, 32, backend=cell.backend)
    for part in (slice(0, 90), slice(90, 180), slice(180, 250)):
        rows = [x[part] for x in data]
        alone = ops.shared_information(rows[:5], rows[5], 8, 32, backend=cell.backend)
        assert torch.equal(found.nmi[:, part], alone.nmi)
        assert torch.equal(found.ncmi[:, :, part], alone.ncmi)


@pytest.mark.slow
def test_memory_of_many_problems() -> None:
    """All tables of these problems would take 1.3 GB."""
    setup = "x = [torch.rand(512, 40) for _ in range(6)]; ops.shared_information(x[:5], x[5], 8, 4)"
    assert megabytes(setup, "ops.shared_information(x[:5], x[5], 8, 32)") < 600
