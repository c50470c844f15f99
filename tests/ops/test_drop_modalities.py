"""drop_modalities: the stream decides which samples lose what, bit for bit; the rest is exact."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cells import ON_THE_CPU, Cell
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, strided_views
from no_sync import no_host_sync
from strategies import COMMON, dtypes, seeds
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.reference.drop_modalities import drop_modalities as reference

NAN = float("nan")


def kept(q: Tensor, rows: int, stream: NoiseStream) -> Tensor:
    """[M, B] bool, from the uniform numbers themselves: they are dropped up to and at q."""
    ids, offsets = stream.counters(len(q))
    draws = [stream.uniform(rows, i, o).cpu() for i, o in zip(ids, offsets, strict=True)]
    return torch.stack([~(u <= p) for u, p in zip(draws, q.detach().cpu().float(), strict=True)])


def what_is_left(feature: Tensor, keep: Tensor, scale: Tensor | None) -> Tensor:
    """One product in the accumulator's precision and one rounding: no backend may differ."""
    wide = torch.float64 if feature.dtype == torch.float64 else torch.float32
    out = feature.detach().cpu().to(wide)
    if scale is not None:
        out = out * scale.cpu().to(wide)
    out = out.to(feature.dtype)
    out[~keep] = 0
    return out


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    different = (actual.cpu() != expected) & ~(actual.cpu().isnan() & expected.isnan())
    assert not bool(different.any()), f"{what}: {int(different.sum())} numbers differ"


def check(
    cell: Cell,
    features: Sequence[Tensor],
    q: Tensor,
    stream: NoiseStream,
    scale: Tensor | None = None,
) -> ops.DroppedModalities:
    before, state = [f.clone() for f in features], stream.state.clone()
    found = ops.drop_modalities(features, q, stream, scale=scale, backend=cell.backend)
    assert torch.equal(stream.state, state), "the stream was advanced"
    expected = kept(q, len(features[0]), stream)
    assert (found.keep.dtype, found.keep.device) == (torch.bool, features[0].device)
    assert found.keep.shape == expected.shape
    assert torch.equal(found.keep.cpu(), expected), "other samples were dropped"
    assert len(found.features) == len(features)
    if scale is not None:  # it reaches the kernels in float64 if a feature is float64
        any_wide = any(f.dtype == torch.float64 for f in features)
        scale = scale.to(torch.float64 if any_wide else torch.float32)
    for m, (out, feature) in enumerate(zip(found.features, features, strict=True)):
        assert_same(feature, before[m].cpu(), f"the input {m} afterwards")
        assert out.is_contiguous() and out.device == feature.device
        assert_same(out, what_is_left(feature, expected[m], scale), f"feature {m}")
    return found


def batches(
    rows: int, shapes: Sequence[Sequence[int]], dtypes_: Sequence[torch.dtype], device: str
) -> list[Tensor]:
    return [
        (3 * torch.randn(rows, *shape)).to(dtypes_[m % len(dtypes_)]).to(device)
        for m, shape in enumerate(shapes)
    ]


# Rows of one number, around vectors of 8 and 16, without numbers, and images.
SHAPES = [(), (1,), (7,), (8,), (16,), (33,), (0,), (3, 5, 2), (128,), (1025,)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_parity(cell: Cell, dtype: torch.dtype, scaled: bool) -> None:
    stream = NoiseStream(2**63 + 5, cell.device)
    stream.advance(3)
    for rows in (1, 5, 33) if cell.slow else (1, 3, 4, 5, 64, 257):
        features = batches(rows, SHAPES, [dtype], cell.device)
        q = torch.rand(len(features), device=cell.device)
        scale = torch.tensor(4 / 3, device=cell.device) if scaled else None
        check(cell, features, q, stream, scale)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_modalities(cell: Cell, count: int) -> None:
    features = batches(21, SHAPES[2 : 2 + count], DTYPES, cell.device)
    q = torch.full((count,), 0.5, device=cell.device)
    check(cell, features, q, NoiseStream(7, cell.device), torch.tensor(0.3, device=cell.device))


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.parametrize("count", [64, 65, 200])
def test_long_lists_of_mixed_dtypes(cell: Cell, count: int) -> None:
    """More tensors than a launch's table holds."""
    features = batches(6, [(m % 11,) for m in range(count)], DTYPES, cell.device)
    q = torch.rand(count, device=cell.device)
    check(cell, features, q, NoiseStream(8, cell.device), torch.tensor(1.7, device=cell.device))


@pytest.mark.parametrize("rows", [1023, 4097])
def test_many_rows(cell: Cell, rows: int) -> None:
    """They take several blocks of threads and of the stream."""
    stream = NoiseStream(9, cell.device).place([3, 2], [1, 6])
    features = batches(rows, [(2,), (5,)], [torch.float32, torch.bfloat16], cell.device)
    check(cell, features, torch.tensor([0.3, 0.6], device=cell.device), stream)


def test_wide_rows(cell: Cell) -> None:
    width = 9_001 if cell.slow else 70_001
    features = batches(4, [(width,), (3,)], [torch.float32, torch.float16], cell.device)
    check(cell, features, torch.tensor([0.5, 0.5], device=cell.device), NoiseStream(1, cell.device))


def test_agrees_with_the_reference(cell: Cell) -> None:
    features = batches(50, [(3,), (), (2, 4)], DTYPES[:3], "cpu")
    stream, q = NoiseStream(4, cell.device), torch.tensor([0.2, 0.5, 0.8])
    scale = torch.tensor(1.25)
    expected, keep = reference(features, q, stream.state.cpu(), [0, 1, 2], [0, 0, 0], scale)
    found = ops.drop_modalities(
        [f.to(cell.device) for f in features],
        q.to(cell.device),
        stream,
        scale=scale.to(cell.device),
        backend=cell.backend,
    )
    assert torch.equal(found.keep.cpu(), keep)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found.features, expected, strict=True))


def test_is_the_formula_of_the_docstring(cell: Cell) -> None:
    feature, stream = torch.randn(30, 4, device=cell.device), NoiseStream(6, cell.device)
    q, scale = torch.full((1,), 0.4, device=cell.device), torch.tensor(1.6, device=cell.device)
    found = ops.drop_modalities([feature], q, stream, scale=scale, backend=cell.backend)
    keep = stream.uniform(30) > q[0]
    assert torch.equal(found.features[0], torch.where(keep[:, None], scale * feature, 0))


def test_a_number_equal_to_q_is_dropped(cell: Cell) -> None:
    """A number just above it is kept."""
    stream = NoiseStream(3, cell.device).place([5, 5, 5], [2, 2, 2])
    u = stream.uniform(9, 5, 2)[7]
    q = torch.stack([u, u.nextafter(torch.zeros_like(u)), u.nextafter(torch.ones_like(u))])
    features = batches(9, [(3,)] * 3, [torch.float32], cell.device)
    found = check(cell, features, q, stream)
    assert found.keep[:, 7].tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_probabilities_of_other_dtypes_are_compared_in_float32(
    cell: Cell, dtype: torch.dtype
) -> None:
    features = batches(200, [(2,), (3,)], [torch.float32], cell.device)
    q = torch.tensor([0.3, 0.7], dtype=dtype, device=cell.device)
    check(cell, features, q, NoiseStream(5, cell.device))
    u = NoiseStream(5, cell.device).uniform(200)[11]
    nearly = u.double() * (1 - 1e-12)  # rounds to u
    q = torch.stack([nearly, nearly])
    assert not bool(check(cell, features, q, NoiseStream(5, cell.device)).keep[0, 11])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probability_zero_one_and_nan(cell: Cell, dtype: torch.dtype) -> None:
    features = batches(100, [(3,)] * 4, [dtype], cell.device)
    q = torch.tensor([0.0, 1.0, NAN, -0.0], device=cell.device)
    found = check(cell, features, q, NoiseStream(5, cell.device))
    assert found.keep.all(1).tolist() == [True, False, True, True]
    assert not bool(found.keep[1].any())
    assert all(torch.equal(found.features[m], features[m]) for m in (0, 2, 3))
    assert not bool(found.features[1].count_nonzero())


def test_probabilities_beyond_the_interval(cell: Cell) -> None:
    """The host does not look at them on a device; the op itself must act as documented."""
    features = batches(50, [(3,)] * 3, [torch.float32], cell.device)
    state = NoiseStream(5, cell.device).state
    q = torch.tensor([-0.5, 1.5, float("inf")], device=cell.device)
    overload = getattr(torch.ops.mmfuse.drop_modalities, cell.backend)
    _, keep = overload(features, q, state, [0, 1, 2], [0, 0, 0], None)
    assert keep.all(1).tolist() == [True, False, False]
    assert keep.any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_what_is_dropped_is_zero_whatever_it_was(
    cell: Cell, dtype: torch.dtype, scaled: bool
) -> None:
    features = batches(40, [(9,), (16,)], [dtype], cell.device)
    for feature in features:
        feature[:, 2] = NAN
        feature[1::2, 3:6] = float("inf")
        feature[::3, 7] = -float("inf")
    q = torch.tensor([0.5, 0.7], device=cell.device)
    scale = torch.tensor(2.0, device=cell.device) if scaled else None
    found = check(cell, features, q, NoiseStream(11, cell.device), scale)
    for feature, keep in zip(found.features, found.keep, strict=True):
        lost = feature[~keep]
        assert len(lost) and not bool(lost.isnan().any()) and not bool(lost.count_nonzero())
        assert not bool(lost.signbit().any())
        assert bool(feature[keep][:, 2].isnan().all())


@pytest.mark.parametrize("value", [0.0, -2.0, 1e30, 1e-30, NAN], ids=str)
def test_any_scale(cell: Cell, value: float) -> None:
    features = batches(40, [(9,)] * 4, DTYPES, cell.device)
    q = torch.full((4,), 0.5, device=cell.device)
    for dtype in (torch.float32, torch.float64):
        scale = torch.tensor(value, dtype=dtype, device=cell.device)
        check(cell, features, q, NoiseStream(11, cell.device), scale)
    check(cell, features[:3], q[:3], NoiseStream(11, cell.device), scale)


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ((5, 0), (0, 0)),
        ((5, 5), (1, 2)),
        ((2**32 - 1, 7), (4, 3)),
        ((3, 2**31), (2**31 + 5, 1_000_003)),
        ((7, 8), (6, 2**40 + 1)),
    ],
    ids=str,
)
def test_placed_streams(cell: Cell, ids: tuple[int, int], offsets: tuple[int, int]) -> None:
    stream = NoiseStream(-7, cell.device).place(ids, offsets)
    features = batches(101, [(3,), (8,)], [torch.float32], cell.device)
    check(cell, features, torch.tensor([0.5, 0.5], device=cell.device), stream)


def test_a_shard_of_the_batch_loses_what_the_whole_would(cell: Cell) -> None:
    features = batches(30, [(3,), (8,)], [torch.float32], cell.device)
    stream, q = NoiseStream(8, cell.device), torch.tensor([0.3, 0.6], device=cell.device)
    whole = ops.drop_modalities(features, q, stream, backend=cell.backend)
    for start in (1, 2, 3, 17):
        shard = stream.place([0, 1], [start, start])
        part = ops.drop_modalities([f[start:] for f in features], q, shard, backend=cell.backend)
        assert torch.equal(part.keep, whole.keep[:, start:])
        for one, other in zip(part.features, whole.features, strict=True):
            assert torch.equal(one, other[start:])


def test_each_step_drops_others_and_repeats_its_own(cell: Cell) -> None:
    features = batches(100, [(3,), (8,)], [torch.float32], cell.device)
    stream, q = NoiseStream(5, cell.device), torch.tensor([0.5, 0.5], device=cell.device)
    first, again = (check(cell, features, q, stream).keep for _ in range(2))
    assert torch.equal(first, again)
    stream.advance()
    later = check(cell, features, q, stream).keep
    assert not torch.equal(first, later)
    assert not torch.equal(first[0], first[1]), "the modalities have their own numbers"


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_the_rate_of_losses(cell: Cell, probability: float) -> None:
    rows = 16_000
    features = [torch.ones(rows, 1, device=cell.device) for _ in range(2)]
    q = torch.full((2,), probability, device=cell.device)
    keep = ops.drop_modalities(features, q, NoiseStream(12345, cell.device), backend=cell.backend)[
        1
    ].double()
    # A frequency has the standard deviation √(q(1 − q)/n); five are allowed.
    deviation = (probability * (1 - probability) / rows) ** 0.5
    assert keep.mean(1).tolist() == pytest.approx([1 - probability] * 2, abs=5 * deviation)
    correlation = float(torch.corrcoef(keep)[0, 1])
    assert abs(correlation) < 5 / rows**0.5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(cell: Cell, dtype: torch.dtype) -> None:
    q = torch.tensor([0.5, 0.5], device=cell.device)
    for rows, shapes in ((0, [(3,), ()]), (0, [(0,), (2, 3)]), (5, [(0,), (2, 0)])):
        for offset in (0, 5):
            stream = NoiseStream(1, cell.device).place([0, 1], [offset, offset])
            features = [f.requires_grad_() for f in batches(rows, shapes, [dtype], cell.device)]
            found = check(cell, features, q, stream)
            torch.autograd.backward(found.features, [torch.ones_like(f) for f in features])
            assert all(f.grad.shape == f.shape for f in features)


@pytest.mark.parametrize("view", list(strided_views("cpu")))
def test_strided(cell: Cell, view: str) -> None:
    feature = strided_views(cell.device)[view]
    other = torch.randn(1, 3, device=cell.device).expand(len(feature), 3)
    q = torch.tensor([0.4, 0.4], device=cell.device)
    scale = torch.tensor([1.0, 3.0], device=cell.device)[1]
    check(cell, [feature, other], q, NoiseStream(6, cell.device), scale)
    check(cell, [feature], q.repeat(2)[::4], NoiseStream(6, cell.device), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(cell: Cell, dtype: torch.dtype) -> None:
    features = []
    for width in (3, 16, 129):
        memory = torch.randn(7 * width + 1).to(dtype).to(cell.device)
        features.append(memory[1:].view(7, width))
    q = torch.full((3,), 0.5, device=cell.device)
    check(cell, features, q, NoiseStream(6, cell.device), torch.tensor(0.7, device=cell.device))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_goes_where_the_feature_went(
    cell: Cell, dtype: torch.dtype, scaled: bool
) -> None:
    """A NaN does not stop it; the gradient of a dropped sample is 0."""
    features = batches(25, [(4, 3), (), (17,)], [dtype, torch.float32], cell.device)
    leaves = [f.requires_grad_() for f in features]
    q = torch.tensor([0.5, 0.3, 0.7], device=cell.device)
    scale = torch.tensor(1 / 3, device=cell.device, requires_grad=True) if scaled else None
    found = check(cell, leaves, q, NoiseStream(2, cell.device), scale)
    assert not found.keep.requires_grad
    grads = [torch.randn_like(f) for f in features]
    for grad, keep in zip(grads, found.keep, strict=True):
        grad[~keep] = NAN
    torch.autograd.backward(found.features, grads)
    for m, leaf in enumerate(leaves):
        expected = what_is_left(grads[m], found.keep[m].cpu(), None if scale is None else scale)
        assert_same(leaf.grad, expected, f"gradient {m}")
    assert scale is None or scale.grad is None


def test_the_backward_op_is_poison_proof(cell: Cell, poisoned: None) -> None:
    grads = batches(9, [(5,), (16,), (0,), (3, 2)], DTYPES, cell.device)
    keep = torch.rand(4, 9, device=cell.device) > 0.5
    backward = getattr(torch.ops.mmfuse.drop_modalities_backward, cell.backend)
    for scale in (None, torch.tensor(0.7, dtype=torch.float64, device=cell.device)):
        for m, out in enumerate(backward(grads, keep, scale)):
            assert_same(out, what_is_left(grads[m], keep[m].cpu(), scale), f"gradient {m}")


def test_gradients_of_some_only(cell: Cell) -> None:
    features = batches(9, [(3,), (4,), (5,)], [torch.float32], cell.device)
    features[0].requires_grad_()
    features[2].requires_grad_()
    q = torch.full((3,), 0.5, device=cell.device)
    found = ops.drop_modalities(features, q, NoiseStream(2, cell.device), backend=cell.backend)
    found.features[2].sum().backward()
    assert features[1].grad is None
    assert torch.equal(features[2].grad, found.keep[2, :, None].expand(9, 5).float())
    assert features[0].grad is None or not bool(features[0].grad.count_nonzero())


def test_gradients_that_are_not_contiguous(cell: Cell) -> None:
    features = [f.requires_grad_() for f in batches(6, [(4,), (2,)], [torch.float32], cell.device)]
    q = torch.full((2,), 0.5, device=cell.device)
    found = ops.drop_modalities(features, q, NoiseStream(2, cell.device), backend=cell.backend)
    weight = torch.randn(4, 6, device=cell.device)
    (found.features[0].t() * weight).sum().backward()
    assert torch.equal(features[0].grad, weight.t() * found.keep[0, :, None])


def test_gradcheck(cell: Cell) -> None:
    leaves = [
        torch.randn(4, *shape, dtype=torch.float64, device=cell.device, requires_grad=True)
        for shape in ((2,), (1, 2), ())
    ]
    q = torch.full((3,), 0.5, device=cell.device)
    scale = torch.tensor(1.5, dtype=torch.float64, device=cell.device)
    stream = NoiseStream(3, cell.device)

    def left(*features: Tensor) -> tuple[Tensor, ...]:
        found = ops.drop_modalities(features, q, stream, scale=scale, backend=cell.backend)
        return tuple(found.features)

    assert torch.autograd.gradcheck(left, leaves)


@ON_THE_CPU
def test_same_bits_for_any_number_of_threads(cell: Cell) -> None:
    features = batches(20_001, [(3,), (17,)], [torch.float32, torch.float16], cell.device)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check(cell, features, torch.tensor([0.5, 0.1]), NoiseStream(1))
    finally:
        torch.set_num_threads(before)


def test_no_host_sync(cell: Cell) -> None:
    features = [f.requires_grad_() for f in batches(6, [(4,), (2,)], [torch.float32], cell.device)]
    q = torch.full((2,), 0.5, device=cell.device)
    scale, stream = torch.tensor(1.5, device=cell.device), NoiseStream(1, cell.device)

    def step() -> None:
        found = ops.drop_modalities(features, q, stream, scale=scale, backend=cell.backend)
        torch.autograd.backward(found.features, [torch.ones_like(f) for f in found.features])

    step()  # compiled before
    with no_host_sync(cell.device):
        step()
    assert all(f.grad is not None for f in features)


def test_pytorchs_generators_are_not_touched(cell: Cell) -> None:
    features = batches(6, [(4,)], [torch.float32], cell.device)
    q, stream = torch.full((1,), 0.5, device=cell.device), NoiseStream(1, cell.device)
    before = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    ops.drop_modalities(features, q, stream, backend=cell.backend)
    after = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@settings(max_examples=6, **COMMON)
@given(
    rows=st.integers(0, 300),
    widths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    dtype=dtypes,
    other=dtypes,
    seed=seeds,
    offset=st.integers(0, 2**33),
    q=st.floats(0, 1, width=32),
)
def test_any_shape_and_place(cell: Cell, rows, widths, dtype, other, seed, offset, q) -> None:
    torch.manual_seed(seed % 2**63)
    features = batches(rows, [(w,) for w in widths], [dtype, other], cell.device)
    stream = NoiseStream(seed, cell.device).place(range(len(widths)), [offset] * len(widths))
    check(cell, features, torch.full((len(widths),), q, device=cell.device), stream)


def test_bad_input() -> None:
    x, q, stream = torch.ones(3, 2), torch.tensor([0.5, 0.5]), NoiseStream(0)
    for arguments, error, match in [
        (([], q[:0], stream), ValueError, "features must hold at least one modality"),
        (([x, x.long()], q, stream), TypeError, r"features\[1\] has dtype torch.int64"),
        (([x.to(torch.complex64), x], q, stream), TypeError, r"features\[0\] has dtype torch.comp"),
        (([x, x.to_sparse()], q, stream), TypeError, r"features\[1\] has layout torch.sparse_coo"),
        (([x, [1.0]], q, stream), TypeError, r"features\[1\] is not a tensor but list"),
        (([x, x.sum()], q, stream), ValueError, r"features\[1\] must be \[B, …\], got a 0-d"),
        (([x[0, 0], x], q, stream), ValueError, r"features\[0\] must be \[B, …\], got a 0-d"),
        (
            ([x, x[:2]], q, stream),
            ValueError,
            r"one batch size: features\[0\] has 3 rows, features\[1\] 2",
        ),
        (([x, x.to("meta")], q, stream), ValueError, r"features\[1\] is on meta, .* on cpu"),
        (([x, x], q[:1], stream), ValueError, r"q must have shape \[2\], got \[1\]"),
        (([x, x], q[None], stream), ValueError, r"q must have shape \[2\], got \[1, 2\]"),
        (([x, x], q.long(), stream), TypeError, r"q must be a floating-point tensor"),
        (([x, x], [0.5, 0.5], stream), TypeError, r"q must be a floating-point tensor"),
        (([x, x], q, None), TypeError, "stream must be a mmfuse.NoiseStream, got NoneType"),
        (([x, x], q, stream.state), TypeError, "stream must be a mmfuse.NoiseStream, got Tensor"),
        (([x, x], q, stream.place([0])), ValueError, "placed for 1 tensors, not 2"),
        (([x, x], torch.tensor([0.5, 1.5]), stream), ValueError, r"q\[1\] must be a prob.* 1.5"),
        (([x, x], torch.tensor([-0.5, 0.5]), stream), ValueError, r"q\[0\] must be a prob.* -0.5"),
    ]:
        with pytest.raises(error, match=match):
            ops.drop_modalities(*arguments)
    for scale in (torch.ones(1), torch.tensor(1)):
        with pytest.raises(ValueError, match="scale must be a dense 0-d floating-point tensor"):
            ops.drop_modalities([x, x], q, stream, scale=scale)
