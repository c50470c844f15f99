"""update_grads_(sq_norm=): the sum of squares of each gradient as it was before the update."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cells import Cell
from inputs import CHUNK_EDGES, DTYPES, SIZES, gradients, like, strided_views, wide
from torch import Tensor

from mmfuse import NoiseStream, ops
from mmfuse.ops import update_grads as op_module

# The terms that an update has besides the scale.
TERMS = ["scale", "second", "pull", "noise", "all"]


def terms(cell: Cell, kind: str, grads: list[Tensor]) -> dict[str, object]:
    count, extra = len(grads), {}
    if kind == "second":
        extra |= {"params": like(grads), "pull": torch.randn(count, device=cell.device)}
    if kind in ("pull", "all"):
        pull = torch.randn(count, device=cell.device)
        extra |= {"params": like(grads), "anchors": like(grads), "pull": pull}
    if kind in ("noise", "all"):
        std = torch.rand(count, device=cell.device)
        extra |= {"noise_std": std, "stream": NoiseStream(7, cell.device)}
    return extra


def unwritten(grads: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """A result of NaN, in the dtype that the op wants at least."""
    least = torch.float32
    if any(g.dtype == torch.float64 for g in grads):
        least = torch.float64
    device = grads[0].device
    return torch.full((len(grads),), torch.nan, dtype=dtype or least, device=device)


def check(cell: Cell, grads: list[Tensor], **extra: object) -> Tensor:
    """Updates with and without sums: the gradients are the same bits, the sums are right."""
    before = wide(grads)
    other = [g.clone() for g in grads]
    scale = extra.pop("scale", torch.rand(len(grads)) + 0.1).to(cell.device)
    sq_norm = extra.pop("sq_norm", None)
    sq_norm = unwritten(grads) if sq_norm is None else sq_norm
    ops.update_grads_(other, scale, **extra, backend=cell.backend)
    ops.update_grads_(grads, scale, **extra, sq_norm=sq_norm, backend=cell.backend)
    for t, (g, o, g0) in enumerate(zip(grads, other, before, strict=True)):
        assert torch.equal(g, o)
        squares = g0.square().sum()
        # Each tensor accumulates in its own precision; a float32 result is rounded once more.
        dtype = g.dtype if sq_norm.dtype == torch.float64 else torch.float32
        bound = tolerances.sum_of_products(dtype, squares)
        tolerances.assert_within(sq_norm[t], squares, bound, f"tensor {t} of {g.numel()}")
    return sq_norm


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TERMS)
def test_parity(cell: Cell, dtype: torch.dtype, kind: str) -> None:
    sizes = [1, 3, 129, 8193] if cell.slow else cell.affordable(SIZES + CHUNK_EDGES)
    grads = gradients([0, *sizes], dtype, cell.device)
    assert float(check(cell, grads, **terms(cell, kind, grads))[0]) == 0.0


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
@pytest.mark.parametrize("kind", TERMS)
def test_odd_addresses(cell: Cell, kind: str) -> None:
    sizes = [1, 5, 64, 1027, 8191, 8197]
    grads = [g for d in DTYPES for g in gradients(sizes, d, cell.device, odd_address=True)]
    extra = terms(cell, kind, grads)
    if "anchors" in extra:
        extra["anchors"] = gradients(sizes * 4, torch.float32, cell.device, odd_address=True)
    check(cell, grads, **extra)


def test_mixed_dtypes_in_one_call(cell: Cell) -> None:
    """The sums of the narrow ones are float32's, in a float64 result."""
    grads = [gradients([n], d, cell.device)[0] for n in (5, 0, 1000) for d in DTYPES]
    anchors = like(grads, torch.bfloat16)
    check(cell, grads, params=like(grads), anchors=anchors, pull=torch.randn(len(grads)))


def test_a_float64_result_of_float32_gradients(cell: Cell) -> None:
    grads = gradients([7, 1030], torch.float32, cell.device)
    found = check(cell, grads, sq_norm=unwritten(grads, torch.float64))
    assert found.dtype == torch.float64


def test_many_tensors(cell: Cell) -> None:
    """There are more than one launch of a CUDA kernel takes."""
    grads = gradients([i % 7 for i in range(60 if cell.slow else 2100)], torch.float32, cell.device)
    check(cell, grads, **terms(cell, "pull", grads))


@pytest.mark.parametrize("view", list(strided_views("cpu")))
@pytest.mark.parametrize("kind", ["scale", "noise"])
def test_strided_gradients(cell: Cell, view: str, kind: str) -> None:
    grad = strided_views(cell.device)[view]
    other = grad.clone()
    extra, scale = terms(cell, kind, [grad]), torch.full((1,), 0.5, device=cell.device)
    columns = torch.full((1, 2), torch.nan, device=cell.device)  # the result is a strided view too
    squares = grad.double().square().sum()
    ops.update_grads_([grad], scale, **extra, sq_norm=columns[:, 1], backend=cell.backend)
    ops.update_grads_([other], scale, **extra, backend=cell.backend)
    assert torch.equal(grad, other)
    bound = tolerances.sum_of_products(torch.float32, squares)
    tolerances.assert_within(columns[0, 1], squares, bound)
    assert bool(columns[0, 0].isnan())


def test_strided_result(cell: Cell) -> None:
    grads = gradients([3, 50, 7], torch.float32, cell.device)
    rows = torch.full((3, 2), torch.nan, device=cell.device)
    check(cell, grads, sq_norm=rows[:, 0])
    assert bool(rows[:, 1].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", [0, 700, 1500], ids=str)
@pytest.mark.parametrize("kind", ["scale", "pull"])
def test_non_finite_stays_in_its_tensor(
    cell: Cell, dtype: torch.dtype, value: float, where: int, kind: str
) -> None:
    grads = gradients([1501, 1501, 1501], dtype, cell.device)
    extra = terms(cell, kind, grads)
    ones, clean, found = torch.ones(3, device=cell.device), unwritten(grads), unwritten(grads)
    ops.update_grads_([g.clone() for g in grads], ones, sq_norm=clean, backend=cell.backend)
    grads[1][where] = value
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    ops.update_grads_(grads, ones, **extra, finite=finite, sq_norm=found, backend=cell.backend)
    assert not bool(finite)
    assert not bool(found[1].isfinite())
    assert bool(found[1].isnan()) == (value != value)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_identity_is_read_and_not_written(cell: Cell) -> None:
    """Quiet and signalling NaNs, signed zeros and subnormals survive; w and w0 do not matter."""
    bits = torch.tensor([0x7F800001, -(2**31), 1, 0x7FC01234], dtype=torch.int32)
    odd = bits.repeat(300).view(torch.float32).to(cell.device)
    zeros = torch.full((2000,), -0.0, device=cell.device)
    grads = [odd, zeros, torch.full((70,), 3.0, device=cell.device)]
    before = [g.view(torch.int32).clone() for g in grads]
    unknown = [torch.full_like(g, torch.nan) for g in grads]
    nothing, found = torch.zeros(3, device=cell.device), unwritten(grads)
    ops.update_grads_(
        grads,
        torch.ones(3, device=cell.device),
        params=unknown,
        anchors=unknown,
        pull=nothing,
        sq_norm=found,
        backend=cell.backend,
    )
    assert bool(found[0].isnan())
    assert found[1:].tolist() == [0.0, 630.0]
    if cell.backend == "reference":  # PyTorch's arithmetic may quieten a signalling NaN
        grads, before = grads[1:], before[1:]
    for g, b in zip(grads, before, strict=True):
        assert torch.equal(g.view(torch.int32), b)


def test_the_sum_does_not_depend_on_the_update(cell: Cell) -> None:
    """Having no update changes nothing either; noise does, which cuts tensors at its own blocks."""
    grads = gradients([5, 8195, 70], torch.float32, cell.device)
    found = []
    for scale, kind in ((1.0, "scale"), (0.5, "scale"), (0.5, "pull")):
        mine = [g.clone() for g in grads]
        found.append(unwritten(mine))
        scales = torch.full((3,), scale, device=cell.device)
        extra = terms(cell, kind, mine)
        ops.update_grads_(mine, scales, **extra, sq_norm=found[-1], backend=cell.backend)
    again = unwritten(grads)
    ops.update_grads_(grads, torch.ones(3, device=cell.device), sq_norm=again, backend=cell.backend)
    assert torch.equal(again, found[0])
    for other in found[1:]:
        bound = 2 * tolerances.sum_of_products(torch.float32, found[0].double())
        tolerances.assert_within(other, found[0], bound)


@pytest.mark.parametrize("kind", TERMS)
def test_same_numbers_for_any_number_of_threads(kind: str) -> None:
    cell = Cell("cpu", "cpu")
    grads = gradients([300_000, 5, 70_001], torch.float32, "cpu")
    extra, threads, found = terms(cell, kind, grads), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(unwritten(grads, torch.float64))
            mine = [g.clone() for g in grads]
            ops.update_grads_(mine, torch.full((3,), 0.5), **extra, sq_norm=found[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_no_tensors(cell: Cell) -> None:
    ops.update_grads_([], torch.empty(0), sq_norm=torch.empty(0), backend=cell.backend)
    grads = [torch.empty(0, device=cell.device), torch.empty(3, 0, device=cell.device)]
    assert check(cell, grads).tolist() == [0.0, 0.0]


def test_gradients_on_two_devices(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device under two names: each part's sums go to their places."""
    grads = gradients([5, 0, 70, 9], torch.float32, cell.device)
    grads[2] = grads[2].double()
    names = {torch.device(cell.device): [0, 3], cell.device: [1, 2]}
    one = op_module.by_device
    monkeypatch.setattr(op_module, "by_device", lambda g: names if len(g) == 4 else one(g))
    check(cell, grads)


def test_fullgraph_compile(cell: Cell) -> None:
    def step(grads: list[Tensor], scale: Tensor) -> Tensor:
        squares = torch.empty_like(scale)
        ops.update_grads_(grads, scale, sq_norm=squares, backend=cell.backend)
        return squares * 2

    grads = gradients([20, 9], torch.float32, cell.device)
    others = [g.clone() for g in grads]
    scale = torch.tensor([0.5, 2.0], device=cell.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grads, scale), step(others, scale))
    for a, b in zip(grads, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sq_norm", "error", "match"),
    [
        (torch.ones(3), ValueError, r"sq_norm must have shape \[2\], got \[3\]"),
        (torch.ones(2, 1), ValueError, r"sq_norm must have shape \[2\], got \[2, 1\]"),
        (torch.ones(2).long(), TypeError, "sq_norm must be a floating-point tensor"),
        (torch.ones(2).half(), ValueError, "sq_norm must be float32 or float64, got torch.float16"),
        (
            torch.ones(2),
            ValueError,
            r"sq_norm must be float64, as grads\[1\] is; got torch.float32",
        ),
        (
            torch.ones(2, device="meta").double(),
            ValueError,
            r"sq_norm is on meta, grads\[0\] on cpu",
        ),
        ([0.0, 0.0], TypeError, "sq_norm must be a floating-point tensor"),
        (torch.ones(1).double().expand(2), ValueError, "sq_norm is an expanded view with strides"),
    ],
)
def test_bad_input(sq_norm: Tensor, error: type[Exception], match: str) -> None:
    grads = [torch.ones(3), torch.ones(2).double()]
    with pytest.raises(error, match=match):
        ops.update_grads_(grads, torch.zeros(2), sq_norm=sq_norm)
    assert all(bool((g == 1).all()) for g in grads)
    if isinstance(sq_norm, Tensor) and sq_norm.device.type == "cpu":
        assert bool((sq_norm == 1).all())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_result_that_requires_a_gradient(backend: str | None, gaps: bool) -> None:
    grads = [torch.ones(3), torch.ones(2)]
    rows = torch.ones(2, 2, requires_grad=True)
    squares = rows[:, 0] if gaps else torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="sq_norm requires a gradient"):
        ops.update_grads_(grads, torch.zeros(2), sq_norm=squares, backend=backend)
    assert all(bool((g == 1).all()) for g in grads)
    with torch.no_grad():
        ops.update_grads_(grads, torch.zeros(2), sq_norm=squares, backend=backend)
    assert squares.tolist() == [3.0, 2.0]
