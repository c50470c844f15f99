"""update_grads_: every backend against the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch
from cells import Cell
from inputs import CHUNK_EDGES, DTYPES, SIZES, gradients, like, strided_views, wide
from torch import Tensor

from mmfuse import NoiseStream, ops


def check(
    cell: Cell,
    grads: list[Tensor],
    *,
    params: list[Tensor] | None = None,
    anchors: list[Tensor] | None = None,
    pull: Tensor | None = None,
    noise_std: Tensor | None = None,
    stream: NoiseStream | None = None,
    scale: Tensor | None = None,
) -> None:
    """Runs one update and compares every element with scale·g + pull·(w − w₀) + noise_std·z."""
    scale = torch.rand(len(grads)) + 0.1 if scale is None else scale
    before = wide(grads)
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    on_device = [None if v is None else v.to(cell.device) for v in (pull, noise_std)]
    ops.update_grads_(
        grads,
        scale.to(cell.device),
        params=params,
        anchors=anchors,
        pull=on_device[0],
        noise_std=on_device[1],
        stream=stream,
        finite=finite,
        backend=cell.backend,
    )
    ids, offsets = stream.counters(len(grads)) if stream else ([], [])
    for t, (g, g0) in enumerate(zip(grads, before, strict=True)):
        # The coefficients reach the kernels in float32, or in float64 if a gradient is float64.
        precision = tolerances.accumulation_dtype(
            torch.float64 if any(x.dtype == torch.float64 for x in grads) else torch.float32
        )
        s = scale[t].to(precision).double()
        expected = s * g0
        pulled = torch.zeros_like(g0)
        if pull is not None:
            p, w = pull[t].to(precision).double(), wide([params[t]])[0]
            w0 = torch.zeros_like(w) if anchors is None else wide([anchors[t]])[0]
            expected = expected + p * (w - w0)
            pulled = p.abs() * (w.abs() + w0.abs())
        z, sigma = torch.zeros_like(g0), torch.zeros(())
        if noise_std is not None:
            z = stream.normal(g0.numel(), ids[t], offsets[t], dtype=torch.float64).cpu()
            z = z.view_as(g0)
            sigma = noise_std[t].to(precision).double()
            expected = expected + sigma * z
        bound = tolerances.updated_grad(g.dtype, expected, s * g0, pulled, sigma, z)
        tolerances.assert_within(g, expected, bound, f"tensor {t} of {g.numel()} elements")
    assert bool(finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lists", "noisy"), list(itertools.product([0, 1, 2], [False, True])), ids=str
)
def test_parity(cell: Cell, dtype: torch.dtype, lists: int, noisy: bool) -> None:
    """The cases: without params, with params alone, and with params and anchors."""
    sizes = cell.affordable(SIZES + CHUNK_EDGES)
    grads = gradients(sizes, dtype, cell.device)
    extra = {}
    if lists >= 1:
        extra |= {"params": like(grads), "pull": torch.randn(len(grads))}
    if lists == 2:
        extra["anchors"] = like(grads)
    if noisy:
        stream = NoiseStream(1234, cell.device)
        stream.advance(3)
        extra |= {"noise_std": torch.rand(len(grads)), "stream": stream}
    check(cell, grads, **extra)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["second", "anchored"])
def test_odd_addresses(cell: Cell, dtype: torch.dtype, anchored: bool) -> None:
    grads, odd = (
        gradients([1, 5, 64, 1027], dtype, cell.device, odd_address=True) for _ in range(2)
    )
    check(
        cell,
        grads,
        params=like(grads) if anchored else odd,
        anchors=odd if anchored else None,
        pull=torch.randn(4),
        noise_std=torch.rand(4),
        stream=NoiseStream(5, cell.device),
    )


def test_chunk_boundaries(cell: Cell) -> None:
    sizes = cell.affordable([*CHUNK_EDGES, 200_003])
    grads = gradients([n for size in sizes for n in (size, 3)], torch.float32, cell.device)
    check(cell, grads, noise_std=torch.rand(len(grads)), stream=NoiseStream(1, cell.device))


@pytest.mark.parametrize("anchored", [False, True], ids=["second", "anchored"])
def test_mixed_dtypes_in_one_call(cell: Cell, anchored: bool) -> None:
    grads = [gradients([n], d, cell.device)[0] for n in (5, 1000) for d in DTYPES]
    check(
        cell,
        grads,
        params=like(grads),
        anchors=like(grads) if anchored else None,
        pull=torch.randn(len(grads)),
        noise_std=torch.rand(len(grads)),
        stream=NoiseStream(2, cell.device),
    )


@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchor_dtype", DTYPES, ids=str)
def test_params_and_anchors_of_other_dtypes(
    cell: Cell, param_dtype: torch.dtype, anchor_dtype: torch.dtype
) -> None:
    grads = gradients([7, 1030], torch.float32, cell.device)
    check(
        cell,
        grads,
        params=like(grads, param_dtype),
        anchors=like(grads, anchor_dtype),
        pull=torch.randn(2),
    )


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_anchors_are_anchors_of_zero(
    cell: Cell, dtype: torch.dtype, param_dtype: torch.dtype, noisy: bool
) -> None:
    """Bit for bit, also the sign of a zero, at a chunk's end and at an odd address."""
    cell.skip_slow(noisy and dtype != param_dtype)
    sizes = cell.affordable([0, 7, 1030, 8197, 40_003])
    grads = gradients(sizes, dtype, cell.device)
    grads += gradients([1027], dtype, cell.device, odd_address=True)
    params = like(grads, param_dtype)
    grads[1][:4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    params[1][:4] = torch.tensor([0.0, 0.0, -0.0, -0.0])
    extra = {"params": params, "pull": torch.randn(len(grads))}
    if noisy:
        extra |= {"noise_std": torch.rand(len(grads)), "stream": NoiseStream(8, cell.device)}
    scale = torch.rand(len(grads)) + 0.1
    other = [g.clone() for g in grads]
    check(cell, grads, scale=scale, **extra)
    check(cell, other, scale=scale, anchors=[torch.zeros_like(w) for w in params], **extra)
    for g, o in zip(grads, other, strict=True):
        assert torch.equal(g, o)
        assert torch.equal(g.signbit(), o.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_params_that_are_not_finite(cell: Cell, dtype: torch.dtype, value: float) -> None:
    """A pull of 0 leaves them alone; another one takes them over, and `finite` says so."""
    grads = gradients([1002, 1002], dtype, cell.device)
    before = [g.to(tolerances.accumulation_dtype(dtype), copy=True) for g in grads]
    params = [torch.full_like(grads[0], value), torch.ones_like(grads[1])]
    for pull, finite in (((0.0, 2.0), True), ((1.0, 0.0), False)):
        flag = torch.ones((), dtype=torch.bool, device=cell.device)
        ops.update_grads_(
            grads,
            torch.ones(2, device=cell.device),
            params=params,
            pull=torch.tensor(pull, device=cell.device),
            finite=flag,
            backend=cell.backend,
        )
        assert bool(flag) == finite
        assert bool(grads[0].isfinite().all()) == finite
        assert torch.equal(grads[1], (before[1] + 2).to(dtype))
        assert torch.equal(grads[0], before[0].to(dtype)) == finite


@pytest.mark.parametrize("anchored", [False, True], ids=["second", "anchored"])
def test_a_coefficient_of_zero_adds_nothing(cell: Cell, anchored: bool) -> None:
    grads = gradients([9, 2000], torch.float32, cell.device)
    expected = [0.5 * g for g in grads]
    infinite = [torch.full_like(g, float("inf")) for g in grads]
    zeros = torch.zeros(2, device=cell.device)
    ops.update_grads_(
        grads,
        torch.full((2,), 0.5, device=cell.device),
        params=infinite,
        anchors=like(grads) if anchored else None,
        pull=zeros,
        noise_std=zeros,
        stream=NoiseStream(3, cell.device),
        backend=cell.backend,
    )
    for g, e in zip(grads, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.slow_except_on("reference", "cpu", "cuda")
def test_many_tensors(cell: Cell) -> None:
    count = 100 if cell.slow else 1300
    sizes = [i % 7 for i in range(count)]
    grads = gradients(sizes, torch.float32, cell.device)
    check(cell, grads, noise_std=torch.rand(len(grads)), stream=NoiseStream(4, cell.device))


def test_no_tensors(cell: Cell) -> None:
    finite = torch.ones((), dtype=torch.bool)
    ops.update_grads_([], torch.empty(0), finite=finite, backend=cell.backend)
    assert bool(finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", [0, 500, 1001], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["unchanged", "scaled"])
def test_non_finite_stays_and_is_reported(
    cell: Cell, dtype: torch.dtype, value: float, where: int, scale: float
) -> None:
    grads = gradients([1002, 1002, 1002], dtype, cell.device)
    others = [grads[0] * scale, grads[2] * scale]
    grads[1][where] = value
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    ops.update_grads_(
        grads,
        torch.full((3,), scale, device=cell.device, dtype=torch.float64),
        finite=finite,
        backend=cell.backend,
    )
    assert not bool(finite)
    assert not bool(grads[1][where].isfinite())
    for g, e in zip((grads[0], grads[2]), others, strict=True):
        assert torch.equal(g, e)


def test_overflow_of_the_stored_type_is_reported(cell: Cell) -> None:
    grads = [torch.full((100,), 60000.0, dtype=torch.float16, device=cell.device)]
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    ops.update_grads_(
        grads, torch.full((1,), 2.0, device=cell.device), finite=finite, backend=cell.backend
    )
    assert bool(grads[0].isinf().all())
    assert not bool(finite)


def test_extreme_values(cell: Cell) -> None:
    extremes = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1.0])
    grads = [extremes.repeat(40).to(cell.device)]
    check(cell, grads, scale=torch.tensor([0.75]))


def test_identity_leaves_the_bits_alone(cell: Cell) -> None:
    """Scale 1 without pull or noise: signalling NaNs, signed zeros and subnormals survive."""
    bits = torch.tensor([0x7F800001, -(2**31), 1, 0x7FC00000], dtype=torch.int32)
    grad = bits.repeat(300).view(torch.float32).to(cell.device)
    before = grad.view(torch.int32).clone()
    ops.update_grads_([grad], torch.ones(1, device=cell.device), backend=cell.backend)
    if cell.backend != "reference":  # PyTorch's arithmetic may quieten a signalling NaN
        assert torch.equal(grad.view(torch.int32), before)
    version = torch.zeros(5, device=cell.device)
    ops.update_grads_([version], torch.ones(1, device=cell.device), backend=cell.backend)
    assert torch.equal(version, torch.zeros_like(version))


@pytest.mark.parametrize("view", list(strided_views("cpu")))
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
def test_strided_gradients_in_place(cell: Cell, view: str, noisy: bool) -> None:
    grad = strided_views(cell.device)[view]
    stride, address = grad.stride(), grad.data_ptr()
    extra = {"noise_std": torch.rand(1), "stream": NoiseStream(6, cell.device)} if noisy else {}
    check(cell, [grad], **extra)
    assert (grad.stride(), grad.data_ptr()) == (stride, address)


@pytest.mark.parametrize("anchored", [False, True], ids=["second", "anchored"])
def test_strided_params_and_anchors(cell: Cell, anchored: bool) -> None:
    grad = torch.randn(6, 5, 4, 3).to(cell.device)
    anchors = [torch.randn(3, 4, 5, 6).to(cell.device).permute(3, 2, 1, 0)]
    check(
        cell,
        [grad],
        params=[torch.randn(6, 5, 4, 3).to(cell.device, memory_format=torch.channels_last)],
        anchors=anchors if anchored else None,
        pull=torch.tensor([0.7]),
    )


@pytest.mark.parametrize("view", list(strided_views("cpu")))
def test_strided_gradients_beside_params(cell: Cell, view: str) -> None:
    """They have another memory format than the params, or the same one."""
    grad = strided_views(cell.device)[view]
    for params in (torch.randn(grad.shape).to(cell.device), torch.randn_like(grad)):
        check(cell, [grad], params=[params], pull=torch.tensor([0.7]))


@pytest.mark.parametrize("view", ["contiguous", *strided_views("cpu")])
def test_autograd_sees_the_change(cell: Cell, view: str) -> None:
    """A graph that needs the old values refuses to go on, as after any in-place operation."""
    cell.skip_slow(view != "contiguous")
    views = {"contiguous": torch.randn(4, 6, device=cell.device), **strided_views(cell.device)}
    grad = views[view]
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    squares = torch.zeros(1, dtype=torch.float64, device=cell.device)
    weight = torch.randn_like(grad, requires_grad=True)
    loss = (weight * grad).sum()
    before = [t._version for t in (grad, finite, squares)]
    scale = torch.full((1,), 0.5, device=cell.device)
    ops.update_grads_([grad], scale, finite=finite, sq_norm=squares, backend=cell.backend)
    after = [t._version for t in (grad, finite, squares)]
    assert all(new > old for new, old in zip(after, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestBadInput:
    """Each error names its culprit, and nothing has been changed."""

    def raises(self, error: type[Exception], match: str, grads: list[Tensor], *args, **kw) -> None:
        before = [g.clone() for g in grads if isinstance(g, Tensor) and not g.is_sparse]
        with pytest.raises(error, match=match):
            ops.update_grads_(grads, *args, **kw)
        after = [g for g in grads if isinstance(g, Tensor) and not g.is_sparse]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    def test_sparse(self) -> None:
        grads = [torch.ones(3), torch.eye(3).to_sparse()]
        self.raises(TypeError, r"grads\[1\] has layout torch.sparse_coo", grads, torch.zeros(2))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
    def test_dtype(self, dtype: torch.dtype) -> None:
        grads = [torch.ones(3), torch.ones(3).to(dtype)]
        self.raises(TypeError, rf"grads\[1\] has dtype {dtype}", grads, torch.zeros(2))

    def test_not_a_tensor(self) -> None:
        self.raises(TypeError, r"grads\[0\] is not a tensor but NoneType", [None], torch.zeros(1))

    def test_lengths(self) -> None:
        self.raises(ValueError, r"scale must have shape \[1\]", [torch.ones(3)], torch.zeros(2))

    def test_a_gradient_on_meta_among_others(self) -> None:
        one, two = torch.ones(3), torch.ones(2, device="meta")
        flag, squares = torch.ones(()).bool(), torch.ones(2)
        for options in ({"finite": flag}, {"sq_norm": squares}):
            with pytest.raises(ValueError, match=r"grads\[1\] is on the meta device"):
                ops.update_grads_([one, two], torch.zeros(2), **options)
            assert one.tolist() == [1, 1, 1]

    def test_no_scale(self) -> None:
        wrong = "scale must be a floating-point tensor"
        self.raises(TypeError, wrong, [torch.ones(3)], None)

    def test_scale_type(self) -> None:
        self.raises(TypeError, "scale must be a floating", [torch.ones(3)], torch.zeros(1).long())

    def test_expanded(self) -> None:
        grads = [torch.ones(1).expand(5)]
        self.raises(ValueError, r"grads\[0\] is an expanded view", grads, torch.zeros(1))

    def test_noise_without_stream(self) -> None:
        g = [torch.ones(3)]
        self.raises(
            ValueError, "noise_std needs a stream", g, torch.zeros(1), noise_std=torch.ones(1)
        )

    def test_pull_without_params(self) -> None:
        g = [torch.ones(3)]
        zero, one = torch.zeros(1), torch.ones(1)
        self.raises(ValueError, "pull needs params", g, zero, pull=one)
        self.raises(ValueError, "params and anchors need pull", g, zero, params=g)
        self.raises(ValueError, "params and anchors need pull", g, zero, anchors=g)
        self.raises(ValueError, "anchors need params", g, zero, pull=one, anchors=g)
        self.raises(ValueError, "1 grads but 2 params", g, zero, pull=one, params=g * 2)

    def test_param_shape(self) -> None:
        g, w = [torch.ones(3)], [torch.ones(4)]
        what = r"params\[0\] has shape \(4,\), its gradient \(3,\)"
        self.raises(ValueError, what, g, torch.zeros(1), pull=torch.ones(1), params=w)

    def test_anchor_shape(self) -> None:
        g = [torch.ones(3)]
        self.raises(
            ValueError,
            r"anchors\[0\] has shape \(4,\)",
            g,
            torch.zeros(1),
            pull=torch.ones(1),
            params=[torch.ones(3)],
            anchors=[torch.ones(4)],
        )

    def test_stream_for_other_tensors(self) -> None:
        g = [torch.ones(3)]
        self.raises(
            ValueError,
            "placed for 2 tensors, not 1",
            g,
            torch.zeros(1),
            noise_std=torch.ones(1),
            stream=NoiseStream(0).place([0, 1]),
        )

    def test_an_inference_tensor(self) -> None:
        with torch.inference_mode():
            grads = [torch.ones(3)]
        scale = torch.zeros(1)
        more = {"pull": scale, "params": [torch.ones(3)]}
        for options in ({}, {"finite": torch.ones(()).bool()}, more):
            with pytest.raises(RuntimeError, match="nference tensor"):
                ops.update_grads_(grads, scale, **options)
            assert grads[0].tolist() == [1, 1, 1]

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_shared_memory(self, backend: str | None) -> None:
        """Threads would write to it at once, or read what another one has written."""
        flat = torch.randn(20)
        rows = [torch.randn(3, 4), flat[:8], flat[8:], torch.randn(2)]
        other = [torch.randn_like(g) for g in rows]
        shifted = [*other[:1], flat[1:9], *other[2:]]
        last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        columns = torch.randn(6, 3)
        for grads, more, names in (
            ([rows[0], rows[3], rows[0]], {}, r"grads\[0\] and grads\[2\]"),
            ([flat[:8], rows[0], flat[7:]], {}, r"grads\[0\] and grads\[2\]"),
            ([last, last[1]], {}, r"grads\[0\] and grads\[1\]"),
            ([columns[:, 1], rows[3], columns[:, 1]], {}, r"grads\[0\] and grads\[2\]"),
            (rows, {"params": shifted}, r"grads\[1\] and params\[1\]"),
            (rows, {"params": other, "anchors": shifted}, r"grads\[1\] and anchors\[1\]"),
            ([flat[:10], flat[10:]], {"params": [flat[10:], flat[:10]]}, r"grads\[.\] and params"),
        ):
            options = {**more, "backend": backend}
            if more:
                options["pull"] = torch.ones(len(grads))
            wrong = f"{names}.* share memory"
            self.raises(ValueError, wrong, grads, torch.zeros(len(grads)), **options)

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_memory_beside_each_other(self, backend: str | None) -> None:
        """Parts of one tensor are fine, and a tensor may be its own parameter."""
        flat, columns = torch.ones(20), torch.ones(6, 3)
        grads = [flat[12:], flat[:8], flat[8:12], columns[:, 0], columns[:, 2], flat[:0]]
        options = {"params": grads, "pull": torch.ones(6), "backend": backend}
        ops.update_grads_(grads, torch.ones(6), **options)
        ops.update_grads_(grads, torch.ones(6), anchors=grads, **options)
        assert all(g.eq(2).all() for g in grads)
        assert columns[:, 1].eq(1).all()

    def test_results_of_inference_mode(self) -> None:
        """They cannot be written later on, which is found before anything is."""
        with torch.inference_mode():
            flag, squares = torch.ones(()).bool(), torch.ones(1)
        for name, value in (("finite", flag), ("sq_norm", squares)):
            for backend in (None, "reference"):
                options = {name: value, "backend": backend}
                wrong = f"{name} is an inference tensor"
                self.raises(RuntimeError, wrong, [torch.ones(3)], torch.zeros(1), **options)

    def test_vectors_on_meta(self) -> None:
        one, empty = torch.ones(1), torch.ones(1, device="meta")
        params = [torch.ones(3)]
        for name, options in (
            ("scale", {"scale": empty}),
            ("pull", {"scale": one, "pull": empty, "params": params}),
            ("noise_std", {"scale": one, "noise_std": empty, "stream": NoiseStream(1)}),
            ("finite", {"scale": one, "finite": empty[0].bool()}),
        ):
            with pytest.raises(ValueError, match=f"{name} is on the meta device"):
                ops.update_grads_([torch.ones(3)], **options)

    def test_finite_flag(self) -> None:
        for flag in (torch.ones(()), torch.ones(1).bool(), torch.ones(()).bool().to_sparse()):
            wrong = "finite must be a dense 0-d bool tensor"
            self.raises(ValueError, wrong, [torch.ones(3)], torch.zeros(1), finite=flag)

    def test_backend_name(self) -> None:
        self.raises(
            ValueError, "backend must be one of", [torch.ones(3)], torch.zeros(1), backend="cpp"
        )
