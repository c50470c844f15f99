"""`update_grads_` and `grad_stats` read their lists in one call, but not everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cells import Cell
from samples._inputs import table_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfuse
from mmfuse import _native, ops
from mmfuse.ops import _lists, update_grads

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around vectors of all widths, a tile of the kernels with noise, a chunk.
SIZES = [1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 1000, 1023, 1025, 32767, 32769]

needs_module = pytest.mark.skipif(
    _native.read_list is None, reason="mmfuse._C was not built for this Python"
)


def gradients(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, generator=generator).to(device, dtype) for n in SIZES]


def factors(device: str = "cpu") -> Tensor:
    return torch.linspace(-1.5, 1.0, len(SIZES)).to(device)


def read_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call reads at once, from now on."""
    counts: list[int] = []

    def counted(read: Callable[..., object], *lists: list[Tensor]) -> object:
        found = read(*lists)
        if found is not None:
            counts.append(sum(map(len, lists)))
        return found

    for name in ("read_list", "read_apart"):
        read = getattr(_native, name)
        assert read is not None
        monkeypatch.setattr(_native, name, partial(counted, read))
    return counts


def beside(kind: str, dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    """Parameters, one of another dtype, and anchors of yet another, if the call has them."""
    made: dict[str, list[Tensor]] = {}
    if "params" in kind or "anchors" in kind:
        made["params"] = [nn.Parameter(g.flip(0)) for g in gradients(dtype, device)]
        made["params"][2] = made["params"][2].detach().double()
    if "anchors" in kind:
        made["anchors"] = [g.roll(1) for g in gradients(torch.bfloat16, device)]
    return made


# No two of them alike in the lists or vectors that they have.
KINDS = ["scale", "params", "anchors", "noise", "params, noise", "anchors, noise"]


@pytest.mark.slow_except_on("cpu", "cuda")  # the others get lists either way
@needs_module
@pytest.mark.parametrize("more", ["", "finite", "finite, squares"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_give_the_same_bits(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, more: str
) -> None:
    cell.skip_slow(dtype is not torch.float32 or more == "finite")
    lists, vector = beside(kind, dtype, cell.device), factors(cell.device)
    counts = read_at_once(monkeypatch)
    results = []
    for quickly in (True, False):
        if not quickly:
            monkeypatch.setattr(_native, "read_list", None)
        grads = gradients(dtype, cell.device)
        before = [g._version for g in grads]
        given: dict[str, Any] = dict(lists)
        if lists:
            given["pull"] = vector.flip(0)
        if "noise" in kind:
            stream = mmfuse.NoiseStream(3, device=cell.device)
            given |= {"noise_std": vector.abs(), "stream": stream}
        if "finite" in more:
            given["finite"] = torch.ones((), dtype=torch.bool, device=cell.device)
        if "squares" in more:
            given["sq_norm"] = torch.empty(len(SIZES), dtype=torch.float64, device=cell.device)
        numbers = [given[name] for name in ("finite", "sq_norm") if name in given]
        before += [t._version for t in numbers]
        ops.update_grads_(tuple(grads), vector, **given, backend=cell.backend)
        found = [*grads, *numbers]
        assert all(t._version > v for t, v in zip(found, before, strict=True))
        if "noise" in kind:
            assert stream.state.tolist()[1] == 0  # which is the caller's to move on
        results.append(found)
    read = len(SIZES) * (1 + len(lists))
    assert counts == ([read] if cell.backend in ("cpu", "cuda") else [])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0][4], gradients(dtype, cell.device)[4])


@pytest.mark.slow_except_on("cpu", "cuda")  # the others get lists either way
@needs_module
@pytest.mark.parametrize("kind", ["", "params", "anchors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_the_same_both_ways(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    grads, lists = gradients(dtype, cell.device), beside(kind, dtype, cell.device)
    counts = read_at_once(monkeypatch)
    quick = ops.grad_stats(tuple(grads), **lists, backend=cell.backend)
    monkeypatch.setattr(_native, "read_list", None)
    slow = ops.grad_stats(grads, **lists, backend=cell.backend)
    read = len(SIZES) * (1 + len(lists))
    assert counts == ([read] if cell.backend in ("cpu", "cuda") else [])
    assert (quick.dot is None) == (kind == "")
    for one, other in zip(quick, slow, strict=True):
        assert one is other is None or torch.equal(one, other)
        assert one is None or one.dtype == other.dtype


def strided() -> Tensor:
    return torch.arange(12.0).view(4, 3).t()


@needs_module
@pytest.mark.parametrize(
    "param",
    [strided(), torch.ones(3, 4).to_sparse(), torch.ones(3, 5), torch.ones(3, 4).int()],
    ids=["strided", "sparse", "other shape", "integers"],
)
@pytest.mark.parametrize("name", ["params", "anchors"])
def test_other_parameters_are_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch, name: str, param: Tensor
) -> None:
    grads, pull = [torch.ones(2), torch.ones(3, 4)], torch.full((2,), 0.5)
    lists = {"params": [torch.ones(2), torch.ones(3, 4)]}
    lists["anchors"] = [torch.zeros(2), torch.zeros(3, 4)]
    lists[name][1] = param
    counts = read_at_once(monkeypatch)
    if param.shape == (3, 4) and param.layout is torch.strided and param.is_floating_point():
        ops.update_grads_(grads, pull, **lists, pull=pull)
        moved = lists["params"][1] - lists["anchors"][1]
        assert torch.equal(grads[1], 0.5 + 0.5 * moved)
        stats = ops.grad_stats(grads, **lists)
        assert float(stats.disp_sq[1]) == float(moved.square().sum())
    else:
        for call in (
            lambda: ops.update_grads_(grads, pull, **lists, pull=pull),
            lambda: ops.grad_stats(grads, **lists),
        ):
            with pytest.raises((TypeError, ValueError), match=rf"{name}\[1\]"):
                call()
        assert all((g == 1).all() for g in grads)
    assert counts == []


@needs_module
def test_a_stream_that_is_placed_keeps_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = mmfuse.NoiseStream(3)
    whole = [torch.zeros(6), torch.zeros(40)]
    one = torch.ones(2)
    counts = read_at_once(monkeypatch)
    ops.update_grads_(whole, one, noise_std=one, stream=stream)
    assert counts == [2]
    part = [torch.zeros(30)]
    placed = stream.place([1], [10])
    ops.update_grads_(part, one[:1], noise_std=one[:1], stream=placed)
    assert counts == [2]
    assert torch.equal(part[0], whole[1][10:])


@needs_module
def test_of_lists_of_another_length_none_is_read() -> None:
    read = _native.read_list
    assert read is not None
    ones = [torch.ones(3), torch.ones(3)]
    assert read(ones, ones, ones) is not None
    assert read(ones, ones[:1], None) is None
    assert read(ones, ones, ones * 2) is None
    assert read(ones, tuple(ones), None) is None


@needs_module
def test_a_tensor_of_inference_mode_is_refused_before_anything_changes() -> None:
    with torch.inference_mode():
        kept = torch.ones(3)
    half = torch.full((2,), 0.5)
    grads = [torch.ones(3), kept]
    with pytest.raises(RuntimeError, match=r"grads\[1\] is an inference tensor"):
        ops.update_grads_(grads, half)
    assert all((g == 1).all() for g in grads)
    with torch.inference_mode():
        ops.update_grads_(grads, half)
    assert all((g == 0.5).all() for g in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_is_looked_at(cell: Cell, dtype: torch.dtype, value: float) -> None:
    size = 70
    for at in range(size - 1, -1, -3 if cell.backend == "cpu" else -23):
        grad = torch.ones(size, dtype=dtype, device=cell.device)
        grad[at] = value
        finite = torch.ones((), dtype=torch.bool, device=cell.device)
        scale = torch.full((1,), 0.5, device=cell.device)
        ops.update_grads_([grad], scale, finite=finite, backend=cell.backend)
        assert not finite, at
        assert (grad == 0.5).sum() == size - 1


@needs_module
def test_dtypes_may_be_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.full((3,), 2.0, dtype=dtype) for dtype in DTYPES]
    counts = read_at_once(monkeypatch)
    ops.update_grads_(grads, torch.tensor([1.5, 0.1, 1.0, -2.0], dtype=torch.float64))
    assert counts == [4]
    expected = [3.0, 2.0 * 0.1, 2.0, -4.0]  # 0.1 in float64, as one gradient is
    assert [g.tolist() for g in grads] == [[x] * 3 for x in expected]


class Marked(Tensor):
    pass


class SeesFunctions(TorchFunctionMode):
    lists = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.lists += sum(isinstance(a, list) for a in args)
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    lists = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.lists += sum(isinstance(a, list) and len(a) == 2 for a in args)
        return func(*args, **(kwargs or {}))


@needs_module
@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(4, 4).t()[:, :2],
        torch.ones(0),
        torch.ones(3).as_subclass(Marked),
    ],
    ids=["strided", "empty", "subclass"],
)
def test_other_gradients_are_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch, grad: Tensor
) -> None:
    grads = [torch.ones(5), grad.clone(memory_format=torch.preserve_format)]
    counts = read_at_once(monkeypatch)
    ops.update_grads_(grads, torch.tensor([0.5, 0.25]))
    assert counts == []
    assert (grads[0] == 0.5).all()
    assert (grads[1] == 0.25).all()


@needs_module
def test_channels_last_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    expected, counts = grad * 0.25, read_at_once(monkeypatch)
    ops.update_grads_([torch.ones(5), grad], torch.tensor([0.5, 0.25]))
    assert counts == [2]
    assert torch.equal(grad, expected)


@needs_module
def test_modes_see_the_gradients_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = read_at_once(monkeypatch)
    grads, scale = [torch.ones(3), torch.ones(2)], torch.full((2,), 0.5)
    for mode in (SeesFunctions(), SeesOperators()):
        with mode:
            ops.update_grads_(grads, scale)
        assert mode.lists > 0
    assert counts == []
    assert all((g == 0.25).all() for g in grads)


@needs_module
def test_what_was_refused_is_refused_before_anything_changes() -> None:
    good = [torch.ones(3), torch.ones(2)]
    scale = torch.full((2,), 0.5)
    expanded = torch.ones(1).expand(2)
    bad: list[tuple[list[Tensor], Tensor, dict, type[Exception], str]] = [
        (good, torch.ones(3), {}, ValueError, "scale must have shape"),
        (good, torch.ones(2, dtype=torch.int64), {}, TypeError, "scale must be a floating"),
        (good, scale, {"finite": torch.ones(1, dtype=torch.bool)}, ValueError, "finite"),
        (good, scale, {"finite": torch.ones(())}, ValueError, "finite"),
        (good, scale, {"backend": "none"}, ValueError, "backend must be one of"),
        (good, scale, {"backend": ""}, ValueError, "backend must be one of"),
        ([good[0], expanded], scale, {}, ValueError, r"grads\[1\] is an expanded view"),
        ([good[0], torch.ones(2, dtype=torch.int32)], scale, {}, TypeError, r"grads\[1\]"),
    ]
    for grads, factor, more, error, text in bad:
        with pytest.raises(error, match=text):
            ops.update_grads_(grads, factor, **more)
    wants = [good[0], torch.ones(2, requires_grad=True)]
    with pytest.raises(RuntimeError, match="require a gradient"):
        ops.update_grads_(wants, scale)
    assert all((g == 1).all() for g in [*good, expanded, *wants])
    with torch.no_grad():
        ops.update_grads_(wants, scale)
    assert all((g == 0.5).all() for g in wants)


def test_without_the_module_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "read_list", None)
    grads = [torch.ones(3)]
    assert _lists.read_lists(update_grads._op, None, grads, None, None) is None
    ops.update_grads_(grads, torch.full((1,), 0.5))
    assert (grads[0] == 0.5).all()


def test_lists_on_the_meta_device() -> None:
    """Their kernels take no table: they know shapes only."""
    grads = [torch.ones(3, device="meta"), torch.ones(2, 2, device="meta")]
    stats = ops.grad_stats(grads)
    assert stats.mean.is_meta and stats.mean.shape == (2,)
    assert ops.update_grads_(grads, torch.ones(2, device="meta")) is None


@pytest.mark.skipif(_native.read_list is None, reason="mmfuse._C was not built for this Python")
def test_the_samples_table_is_the_real_one() -> None:
    assert _native.read_list is not None
    grads = [torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last), torch.randn(7)]
    grads += [torch.randn(2, 3, dtype=dtype) for dtype in (torch.float16, torch.float64)]
    grads += [torch.randn(2, 3, 1, 2, 2).to(memory_format=torch.channels_last_3d).bfloat16()]
    assert torch.equal(table_of(grads), _native.read_list(grads)[1])
