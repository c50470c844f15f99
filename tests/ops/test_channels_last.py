"""Gradients in channels_last: read and written where they lie, with noise by the logical index."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tolerances
import torch
from cells import ON_THE_CPU, Cell
from dispatched import launches_of
from inputs import DTYPES, wide
from torch import Tensor, nn

from mmfuse import OGM, InfoReg, NoiseStream, ops

# Channels and kernels of odd and even sizes; rows shorter and longer than a tile, which is cut by
# its channels, by its places or by both; many rows in a tile, and more rows than it holds.
SMALL = [(3, 1, 3, 3), (7, 3, 3, 3), (5, 5, 1, 1), (2, 4, 2, 2), (9, 8, 3, 3), (3, 5, 1, 3, 2)]
LARGE = [
    (70, 3, 7, 7),
    (65, 64, 3, 3),
    (2, 520, 3, 3),
    (1, 1000, 3, 3),
    (2, 8, 40, 30),
    (2, 3, 70, 71),
    (1, 2, 3000, 3),
    (2, 40, 300, 1),
    (2, 20, 3, 20, 25),
    (40, 3, 3, 3, 3),
]


def formatted(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def in_channels_last(cell: Cell, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype):
    """Random tensors in channels_last, and one between them that has no such format."""
    made = [formatted(torch.randn(s).to(cell.device, dtype)) for s in shapes]
    made.insert(1, torch.randn(37).to(cell.device, dtype))
    return made


def shapes_for(cell: Cell) -> list[tuple[int, ...]]:
    return SMALL if cell.slow else SMALL + LARGE


def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: object) -> None:
        raise AssertionError("a tensor was copied")

    monkeypatch.setattr(torch, "_foreach_copy_", copied)


def check(
    cell: Cell,
    grads: list[Tensor],
    *,
    params: list[Tensor] | None = None,
    anchors: list[Tensor] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    """One noisy update, every element against the formula in float64."""
    count = len(grads)
    before, places = wide(grads), [(g.data_ptr(), g.stride()) for g in grads]
    precision = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    scale, pull, std = (torch.rand(count, dtype=precision) + 0.1 for _ in range(3))
    stream = NoiseStream(11, cell.device)
    stream.advance(2)
    if offsets is not None:
        stream = stream.place([5 + 2 * t for t in range(count)], list(offsets))
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    squares = torch.empty(count, dtype=precision, device=cell.device)
    ops.update_grads_(
        grads,
        scale.to(cell.device),
        params=params,
        anchors=anchors,
        pull=None if params is None else pull.to(cell.device),
        noise_std=std.to(cell.device),
        stream=stream,
        finite=finite,
        sq_norm=squares,
        backend=cell.backend,
    )
    assert bool(finite)
    assert places == [(g.data_ptr(), g.stride()) for g in grads]
    ids, starts = stream.counters(count)
    for t, (g, g0) in enumerate(zip(grads, before, strict=True)):
        z = stream.normal(g.numel(), ids[t], starts[t], dtype=torch.float64).cpu().view(g.shape)
        expected = scale[t].double() * g0 + std[t].double() * z
        pulled = torch.zeros_like(g0)
        if params is not None:
            w = wide([params[t]])[0]
            w0 = torch.zeros_like(w) if anchors is None else wide([anchors[t]])[0]
            expected += pull[t].double() * (w - w0)
            pulled = pull[t].double() * (w.abs() + w0.abs())
        bound = tolerances.updated_grad(
            g.dtype, expected, scale[t].double() * g0, pulled, std[t].double(), z
        )
        tolerances.assert_within(g, expected, bound, f"tensor {t} of {tuple(g.shape)}")
        sums = tolerances.sum_of_products(
            g.dtype if precision == torch.float64 else torch.float32, g0.square().sum()
        )
        tolerances.assert_within(squares[t], g0.square().sum(), sums, f"squares {t}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beside", ["nothing", "second", "anchored", "mixed"])
def test_noise_by_the_logical_index(
    cell: Cell, dtype: torch.dtype, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell.skip_slow(beside in ("second", "mixed"))
    no_copies(monkeypatch)
    shapes = shapes_for(cell)
    grads = in_channels_last(cell, shapes, dtype)
    extra = {}
    if beside != "nothing":
        extra["params"] = in_channels_last(cell, shapes, dtype)
    if beside in ("anchored", "mixed"):
        extra["anchors"] = in_channels_last(
            cell, shapes, torch.bfloat16 if beside == "mixed" else dtype
        )
    check(cell, grads, **extra)


@pytest.mark.parametrize("offset", [1, 6, 2**34 - 30])
def test_offsets_in_the_stream(cell: Cell, offset: int) -> None:
    """The offsets lie within a block of the noise, and across the upper word of its number."""
    cell.skip_slow(offset == 6)
    shapes = SMALL if cell.slow else [*SMALL, (2, 520, 3, 3), (2, 3, 70, 71)]
    grads = in_channels_last(cell, shapes, torch.float32)
    check(cell, grads, offsets=[offset + t for t in range(len(grads))])


def test_an_odd_address(cell: Cell) -> None:
    """No vectors can be loaded there, though the channels are a multiple of four."""
    made = []
    for _ in range(3):
        memory = torch.randn(5 * 9 * 8 + 1).to(cell.device)
        made.append([memory[1:].view(5, 3, 3, 8).permute(0, 3, 1, 2)])
    check(cell, made[0], params=made[1], anchors=made[2])


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
def test_params_in_another_format(cell: Cell, noisy: bool) -> None:
    """They are copied, the gradients are not."""
    cell.skip_slow(not noisy)
    shapes = [(5, 4, 3, 3), (4, 3, 2, 2, 2)]
    grads = [formatted(torch.randn(s)).to(cell.device) for s in shapes]
    others = [torch.randn(s).to(cell.device) for s in shapes]
    turned = [torch.randn(s[::-1]).to(cell.device).permute(*range(len(s))[::-1]) for s in shapes]
    if noisy:
        check(cell, grads, params=others, anchors=turned)
        check(cell, others, params=grads, anchors=turned)
    scale = torch.full((2,), 0.5, device=cell.device)
    expected = [0.5 * g + (w - w0) for g, w, w0 in zip(grads, others, turned, strict=True)]
    ops.update_grads_(
        grads, scale, params=others, anchors=turned, pull=2 * scale, backend=cell.backend
    )
    for g, e in zip(grads, expected, strict=True):
        assert torch.equal(g, e)
    stats = ops.grad_stats(grads, others, backend=cell.backend)
    for t, (g, w) in enumerate(zip(wide(grads), wide(others), strict=True)):
        bound = tolerances.sum_of_products(torch.float32, (g * w).abs().sum())
        tolerances.assert_within(stats.dot[t], (g * w).sum(), bound, f"dot {t}")


def test_a_std_of_zero_adds_nothing(cell: Cell) -> None:
    """If the scale is 1 too, not even the bits of a NaN change."""
    grads = in_channels_last(cell, [(4, 3, 3, 3), (3, 4, 2, 2)], torch.float32)
    bits = [g.view(torch.int32).clone() for g in grads]
    zeros = torch.zeros(3, device=cell.device)
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    stream = NoiseStream(3, cell.device)
    ops.update_grads_(
        grads, zeros + 1, noise_std=zeros, stream=stream, finite=finite, backend=cell.backend
    )
    assert bool(finite)
    assert all(torch.equal(g.view(torch.int32), b) for g, b in zip(grads, bits, strict=True))
    grads[0][3, 2, 1, 0] = float("nan")
    ops.update_grads_(
        grads, zeros + 1, noise_std=zeros, stream=stream, finite=finite, backend=cell.backend
    )
    assert not bool(finite)


def test_a_nan_is_reported(cell: Cell) -> None:
    grads = in_channels_last(cell, [(4, 3, 3, 3), (3, 4, 2, 2)], torch.float32)
    grads[2][2, 3, 1, 1] = float("inf")
    ones = torch.ones(3, device=cell.device)
    finite = torch.ones((), dtype=torch.bool, device=cell.device)
    stream = NoiseStream(3, cell.device)
    ops.update_grads_(
        grads, ones, noise_std=ones, stream=stream, finite=finite, backend=cell.backend
    )
    assert not bool(finite)
    assert [int((~g.isfinite()).sum()) for g in grads] == [0, 0, 1]


def test_long_rows_are_copied(cell: Cell) -> None:
    """More than 2²⁰ elements in one index of the first dimension: one copy there and one back."""
    cell.skip_slow()
    grad = formatted(torch.randn(1, 2, 725, 725).to(cell.device))
    ones = torch.ones(1, device=cell.device)
    other = grad.contiguous()
    for g in (grad, other):
        stream = NoiseStream(3, cell.device)
        call = lambda g=g, s=stream: ops.update_grads_(  # noqa: E731
            [g], ones, noise_std=ones, stream=s, backend=cell.backend
        )
        counted = launches_of(call)
        copies = {n: c for n, c in counted.operators.items() if "copy" in n or "clone" in n}
        assert copies == ({"_foreach_copy_": 2} if g is grad else {})
    assert torch.equal(grad, other)


def test_other_orders_are_copied_together(cell: Cell) -> None:
    """Permutations and gaps: two operators for all of them."""
    if cell.backend == "reference":
        pytest.skip("the reference is many operators behind one name")
    grads = [torch.randn(9, 4).to(cell.device).t() for _ in range(3)]
    grads += [torch.randn(20).to(cell.device)[::2], torch.randn(8).to(cell.device)]
    ones = torch.ones(5, device=cell.device)
    stream = NoiseStream(3, cell.device)
    counted = launches_of(
        lambda: ops.update_grads_(grads, ones, noise_std=ones, stream=stream, backend=cell.backend)
    )
    assert counted.operators.pop("_foreach_copy_") == 2
    assert counted.operators.total() == 1
    check(cell, grads)


class TestMethods:
    """Steps on encoders in channels_last take the operators that contiguous ones take."""

    def net(self, cell: Cell, last: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 4)]
        net = nn.Sequential(*layers).to(cell.device)
        return net.to(memory_format=torch.channels_last) if last else net

    @pytest.mark.parametrize("kind", ["OGM-GE", "OGM", "InfoReg"])
    def test_operators(self, cell: Cell, kind: str) -> None:
        cell.skip_slow(kind == "OGM")
        counts = []
        for last in (False, True):
            encoders = {name: self.net(cell, last) for name in ("a", "b")}
            if kind == "InfoReg":
                method = InfoReg(encoders, backend=cell.backend)
                method.set_epoch(0)
            else:
                method = OGM(encoders, noise=kind == "OGM-GE", backend=cell.backend)
            labels = torch.tensor([0, 1, 2, 3], device=cell.device)
            for _ in range(2):
                x = formatted(torch.randn(4, 3, 6, 6).to(cell.device))
                logits = {n: (i + 1) * net(x) for i, (n, net) in enumerate(encoders.items())}
                nn.functional.cross_entropy(sum(logits.values()), labels).backward()
                if last:
                    assert not encoders["a"][1].weight.grad.is_contiguous()
                logits = {n: z.detach() for n, z in logits.items()}
                counted = launches_of(lambda m=method, z=logits, y=labels: m.step(z, y))
                for net in encoders.values():
                    net.zero_grad()
            counts.append((counted.operators, counted.calls))
        assert counts[0] == counts[1]


@ON_THE_CPU
def test_fullgraph_compile(cell: Cell) -> None:
    def step(grads: list[Tensor], params: list[Tensor], scale: Tensor) -> None:
        ops.update_grads_(
            grads,
            scale,
            params=params,
            pull=scale,
            noise_std=scale,
            stream=fixed,
            backend=cell.backend,
        )

    fixed = NoiseStream(3, cell.device)
    grads = in_channels_last(cell, SMALL, torch.float32)
    grads.append(torch.randn(5, 7).t())
    params = [torch.randn(g.shape) if i % 2 else torch.randn_like(g) for i, g in enumerate(grads)]
    others = [g.clone() for g in grads]
    scale = torch.rand(len(grads), device=cell.device)
    torch.compile(step, fullgraph=True, backend="aot_eager")(grads, params, scale)
    step(others, params, scale)
    for a, b in zip(grads, others, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("layout", ["transposed", "long rows"])
def test_the_op_itself_refuses_other_orders(cell: Cell, layout: str) -> None:
    """A caller without the checks in Python gets an error and no wrong numbers."""
    if cell.backend not in ("cpu", "cuda"):
        pytest.skip("the checks are those of the compiled backends")
    grad = torch.randn(4, 3, 2, 2).permute(3, 2, 1, 0).to(cell.device)
    if layout == "long rows":
        grad = formatted(torch.zeros(1, 2, 725, 725).to(cell.device))
    op = getattr(torch.ops.mmfuse.update_grads_, cell.backend)
    ones, state = torch.ones(1, device=cell.device), NoiseStream(1, cell.device).state
    before = grad.clone()
    with pytest.raises(RuntimeError, match="channels_last"):
        op([grad], ones, [], [], None, ones, state, [0], [0], None, None)
    assert torch.equal(grad, before)
