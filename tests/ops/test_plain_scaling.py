"""Scaling alone, where `update_grads_` reads its gradients in one call, and where it must not."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmfuse import _native, ops
from mmfuse.ops import update_grads

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
    """How many gradients each call reads at once, from now on."""
    counts: list[int] = []
    read = _native.read_list
    assert read is not None

    def counted(grads: list[Tensor]) -> object:
        found = read(grads)
        if found is not None:
            counts.append(len(grads))
        return found

    monkeypatch.setattr(_native, "read_list", counted)
    return counts


@needs_module
@pytest.mark.parametrize("flagged", [False, True], ids=["", "finite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_give_the_same_bits(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, flagged: bool
) -> None:
    quick, slow = (gradients(dtype, cell.device) for _ in range(2))
    flags = [torch.ones((), dtype=torch.bool, device=cell.device) for _ in range(2)]
    counts = read_at_once(monkeypatch)
    before = [g._version for g in quick]
    given = flags[0] if flagged else None
    ops.update_grads_(tuple(quick), factors(cell.device), finite=given, backend=cell.backend)
    assert counts == ([len(SIZES)] if cell.backend in ("cpu", "cuda") else [])
    assert all(g._version > v for g, v in zip(quick, before, strict=True))
    monkeypatch.setattr(_native, "read_list", None)
    given = flags[1] if flagged else None
    ops.update_grads_(slow, factors(cell.device), finite=given, backend=cell.backend)
    for one, other in zip(quick, slow, strict=True):
        assert torch.equal(one, other)
    assert flags[0] and flags[1]


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
    assert not update_grads._scale_usual(grads, torch.full((1,), 0.5), None, None)
    ops.update_grads_(grads, torch.full((1,), 0.5))
    assert (grads[0] == 0.5).all()
