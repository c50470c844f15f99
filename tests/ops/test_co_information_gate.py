"""co_information_gate: open on one side of the threshold, closed on the other and in doubt."""

from __future__ import annotations

from itertools import combinations

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from cosines import rows_of, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, wide
from strategies import COMMON, dtypes, seeds
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops
from mmfuse.reference.co_information_gate import co_information_gate as reference

INF, NAN = float("inf"), float("nan")


def features(count: int, batch: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Each pair agrees to another degree; the lengths differ."""
    common = torch.randn(batch, width)
    return [
        (10.0 ** (m % 4 - 2) * (0.5 * m * common + torch.randn(batch, width))).to(dtype).to(device)
        for m in range(count)
    ]


def gate(cell: Cell, modalities: list[Tensor], threshold: float | Tensor) -> float:
    value = ops.co_information_gate(modalities, threshold, backend=cell.backend)
    dtype = modalities[0].dtype
    for x in modalities[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    assert value.dtype == tolerances.accumulation_dtype(dtype)
    assert (value.shape, value.device) == ((), modalities[0].device)
    assert not value.requires_grad
    return float(value)


def mean_and_bound(modalities: list[Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """The mean over pairs and rows in float64, and how far a backend's may be from it."""
    cosines, bounds = [], []
    for a, b in combinations(modalities, 2):
        rows = rows_of(a, b)
        divisor = rows.norms[0] * rows.norms[1]
        cosines.append(rows.cosines.mean())
        bounds.append(tolerances.cosine(dtype, rows.cosines, rows.overlap, divisor, a.shape[1]))
    mean = float(torch.stack(cosines).mean())
    bound = tolerances.gate(dtype, torch.stack(bounds), torch.stack(cosines), mean)
    return mean, float(bound)


def check(cell: Cell, modalities: list[Tensor], dtype: torch.dtype) -> None:
    """Closes as soon as the threshold is above the mean, and not before: to its rounding errors."""
    before = [x.clone() for x in modalities]
    mean, bound = mean_and_bound(modalities, dtype)
    exact = wide(modalities)
    for threshold, expected in ((mean - 2 * bound, 1.0), (mean + 2 * bound, 0.0)):
        what = f"{len(modalities)} x {tuple(modalities[0].shape)} at {threshold}, mean {mean}"
        limit = torch.tensor(threshold, dtype=torch.float64)
        assert float(reference(exact, limit)) == expected, what
        assert gate(cell, modalities, threshold) == expected, what
    for x, copy in zip(modalities, before, strict=True):
        assert torch.equal(x, copy), "a feature was written to"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_parity(cell: Cell, dtype: torch.dtype, count: int) -> None:
    several = [(9, 7), (65, 33), (1, 300)][: 1 if cell.slow else 3]
    for batch, width in shapes(cell) if count == 2 else several:
        check(cell, features(count, batch, width, dtype, cell.device), dtype)


@pytest.mark.parametrize("count", [4, 7])
def test_many_modalities(cell: Cell, count: int) -> None:
    check(cell, features(count, 3, 5, torch.float32, cell.device), torch.float32)


def test_is_the_mean_over_the_pairs(cell: Cell) -> None:
    """One-hot rows: only the pairs (0, 1), (0, 2) and (1, 2) of the ten agree."""
    one, two, three = torch.eye(3, device=cell.device)
    modalities = [x.expand(4, 3) for x in (one, one, one, two, three)]
    assert gate(cell, modalities, 0.29) == 1.0
    assert gate(cell, modalities, 0.31) == 0.0


def test_equals_paired_cosine_above_the_threshold(cell: Cell) -> None:
    a, b = features(2, 16, 40, torch.float32, cell.device)
    cosine = ops.paired_cosine(a, b, backend=cell.backend)
    mean, bound = mean_and_bound([a, b], torch.float32)
    for threshold in (mean - 2 * bound, mean + 2 * bound):
        assert gate(cell, [a, b], threshold) == float(cosine > threshold)
    assert abs(float(F.cosine_similarity(*wide([a, b])).mean()) - mean) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_equal_to_the_threshold_is_closed(cell: Cell, dtype: torch.dtype, count: int) -> None:
    """Powers of two and one-hot rows: the means 1, 0 and −1 are exact in every backend."""
    same = [2.0**m * torch.eye(8, dtype=dtype, device=cell.device) for m in range(count)]
    apart = [x.roll(m, 0) for m, x in enumerate(same)]
    for modalities, mean in ((same, 1.0), (apart, 0.0), ([same[0], -same[1]], -1.0)):
        assert gate(cell, modalities, mean) == 0.0, mean
        assert gate(cell, modalities, mean - 1e-3) == 1.0, mean


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_of_the_rows_equal_to_the_threshold(cell: Cell, dtype: torch.dtype) -> None:
    a = torch.eye(8, dtype=dtype, device=cell.device)
    b = a.clone()
    b[4:] = a[4:].roll(1, 0)
    assert gate(cell, [a, b], 0.5) == 0.0
    assert gate(cell, [a, b], torch.tensor(0.5, device=cell.device)) == 0.0
    assert gate(cell, [a, b], 0.499) == 1.0


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_threshold_tensors(cell: Cell, dtype: torch.dtype, given: torch.dtype) -> None:
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # cos = 0.7071
    modalities = [x.to(dtype).to(cell.device) for x in (a, b)]
    limits = torch.tensor([[9.0, 0.6875], [9.0, 0.71875]], dtype=given, device=cell.device)
    before = limits.clone()
    assert gate(cell, modalities, limits[0, 1]) == 1.0
    assert gate(cell, modalities, limits[1, 1]) == 0.0
    assert torch.equal(limits, before), "the threshold was written to"


def test_integers_are_numbers(cell: Cell) -> None:
    a = torch.ones(2, 3, device=cell.device)
    assert (gate(cell, [a, a], 0), gate(cell, [a, a], 2)) == (1.0, 0.0)


def test_thresholds_beyond_every_cosine(cell: Cell) -> None:
    modalities = features(3, 5, 7, torch.float32, cell.device)
    for threshold, expected in ((-INF, 1.0), (INF, 0.0), (NAN, 0.0), (-1.5, 1.0), (1.5, 0.0)):
        assert gate(cell, modalities, threshold) == expected
        limit = torch.tensor(threshold, device=cell.device)
        assert gate(cell, modalities, limit) == expected


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("width", [0, 5])
def test_an_empty_batch_is_closed(cell: Cell, count: int, width: int) -> None:
    modalities = [torch.zeros(0, width, device=cell.device) for _ in range(count)]
    assert gate(cell, modalities, -2.0) == 0.0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("width", [0, 5])
def test_rows_without_a_length_have_cosine_zero(cell: Cell, count: int, width: int) -> None:
    modalities = [torch.zeros(4, width, device=cell.device) for _ in range(count)]
    assert gate(cell, modalities, 0.0) == 0.0
    assert gate(cell, modalities, -1e-6) == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_is_closed(cell: Cell, dtype: torch.dtype) -> None:
    modalities = features(3, 7, 37, dtype, cell.device)
    assert gate(cell, modalities, -2.0) == 1.0
    for value, m, where in ((NAN, 0, (0, 0)), (INF, 1, (3, 20)), (-INF, 2, (6, 36))):
        bad = [x.clone() for x in modalities]
        bad[m][where] = value
        assert gate(cell, bad, -2.0) == 0.0, (value, m, where)


@pytest.mark.parametrize("size", [1e-15, 1e15, 1e18], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_extreme_magnitudes(cell: Cell, dtype: torch.dtype, size: float) -> None:
    z = torch.randn(3, 9, 33, dtype=torch.float64)
    sizes = torch.tensor([size, 1.0, size]).view(3, 1, 1)
    modalities = list((sizes * (z + z[0])).to(dtype).to(cell.device))
    check(cell, modalities, dtype)


def test_strided_and_misaligned(cell: Cell) -> None:
    z = torch.randn(3 * 17 * 33 + 1).to(cell.device)
    odd = z[1:].view(3, 17, 33)
    modalities = [odd[0], odd[1] + odd[0], (odd[2] + odd[0]).t().contiguous().t()]
    check(cell, modalities, torch.float32)
    check(cell, [odd[1], odd[1, :, :1].expand(17, 33)], torch.float32)
    check(cell, [odd[0, :, ::2], odd[1, :, 16:], odd[2, :, :17]], torch.float32)


def test_mixed_dtypes_are_promoted(cell: Cell) -> None:
    z = features(4, 9, 20, torch.float32, cell.device)
    check(cell, [z[0].half(), z[1].bfloat16()], torch.float32)
    check(cell, [z[0].bfloat16(), z[1].bfloat16(), z[2]], torch.float32)
    check(cell, [x.to(d) for x, d in zip(z, DTYPES, strict=True)], torch.float64)


def test_no_gradient_flows(cell: Cell) -> None:
    modalities = [x.requires_grad_() for x in features(3, 5, 7, torch.float32, cell.device)]
    threshold = torch.tensor(0.1, device=cell.device, requires_grad=True)
    value = ops.co_information_gate(modalities, threshold, backend=cell.backend)
    assert not value.requires_grad
    # It may scale a loss all the same.
    (value * modalities[0]).sum().backward()
    assert torch.equal(modalities[0].grad, value.expand(5, 7))


@ON_THE_CPU
def test_same_verdict_for_any_number_of_threads(cell: Cell) -> None:
    """The threshold is the mean itself, where the last bit decides."""
    modalities = features(3, 5000, 65, torch.float32, cell.device)
    mean, bound = mean_and_bound(modalities, torch.float32)
    thresholds = [mean + bound * k / 200 for k in range(-20, 21)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([gate(cell, modalities, t) for t in thresholds])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@settings(max_examples=5, **COMMON)
@given(
    count=st.integers(2, 4),
    batch=st.integers(1, 9),
    width=st.integers(1, 70),
    dtype=dtypes,
    seed=seeds,
)
def test_order_does_not_matter_and_lower_thresholds_stay_open(
    cell: Cell, count, batch, width, dtype, seed
) -> None:
    torch.manual_seed(seed % 2**63)
    modalities = features(count, batch, width, dtype, cell.device)
    check(cell, modalities, dtype)
    check(cell, modalities[::-1], dtype)
    verdicts = [gate(cell, modalities, t) for t in (-1.1, 0.0, 1.1)]
    assert verdicts in ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])


def test_bad_input() -> None:
    z = torch.ones(3, 2)
    number = "threshold must be a number or a dense 0-d floating-point tensor"
    for arguments, error, match in [
        (([], 0.5), ValueError, "at least two modalities, got 0"),
        (([z], 0.5), ValueError, "at least two modalities, got 1"),
        (([z, z.long()], 0.5), TypeError, r"features\[1\] has dtype torch.int64"),
        (([z, z, z.to(torch.complex64)], 0.5), TypeError, r"features\[2\] has dtype torch.complex"),
        (([z.to_sparse(), z], 0.5), TypeError, r"features\[0\] has layout torch.sparse_coo"),
        (([z, [1.0]], 0.5), TypeError, r"features\[1\] is not a tensor but list"),
        (([z, z[0]], 0.5), ValueError, r"features\[1\] must be \[B, D\], got \[2\]"),
        (
            ([z, z, z[:2]], 0.5),
            ValueError,
            r"one shape: features\[0\] is \[3, 2\], features\[2\] \[2, 2\]",
        ),
        (([z, z.to("meta")], 0.5), ValueError, r"features\[1\] is on meta, features\[0\] on cpu"),
        (([z, z], torch.ones(1)), TypeError, number),
        (([z, z], torch.tensor(1)), TypeError, number),
        (([z, z], None), TypeError, "NoneType"),
    ]:
        with pytest.raises(error, match=match):
            ops.co_information_gate(*arguments)
