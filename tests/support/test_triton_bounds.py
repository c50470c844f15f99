"""Kernels that are misused on purpose are reported, with their names; those that are right are not.

The code between `checked_bounds` and the tensors of an operator is tried with mmfuse's own ops.
"""

# ruff: noqa: N803 - compile-time arguments are written in capitals
from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_bounds import BoundsError, checked_bounds
from triton_source import dropped_mask

from mmfuse import ops
from mmfuse.triton import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")

BLOCK = 8


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i * step, mask=i < size), mask=i < size)


@triton.jit
def _no_mask_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i * step), mask=i < size)


@triton.jit
def _off_by_one_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i * step, mask=i < size), mask=i <= size)


@triton.jit
def _before_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr - 1 + i * step, mask=i < size), mask=i < size)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * step, mask=i < size)
    tl.atomic_add(out_ptr + i * step, x, mask=i < size)


@triton.jit
def _picked_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    """Its pointers come from both tensors, lane by lane, and then go through a view."""
    i = tl.arange(0, BLOCK)
    pointers = tl.where(i < size, x_ptr + i, out_ptr + i)
    pointers = tl.reshape(pointers, [2, BLOCK // 2])
    tl.store(pointers, 1.0)


@triton.jit
def _promise_kernel(x_ptr, out_ptr, size, step, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(tl.multiple_of(x_ptr, 16)))


@triton.jit
def _pointers_kernel(x_ptrs, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in tl.static_range(len(x_ptrs)):
        tl.store(x_ptrs[k] + i, 1.0, mask=i < size)


@triton.jit
def _table_kernel(table_ptr, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointer = tl.load(table_ptr).to(tl.pointer_type(DTYPE))
    tl.store(pointer + i, 1.0, mask=i < size)


@triton.jit
def _kept_out_kernel(x_ptr, out_ptr, flags_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < 2)
    tl.store(out_ptr + i, x + tl.load(x_ptr + i, mask=i < 3, other=0.0))
    tl.store(flags_ptr + i, tl.load(flags_ptr + i, mask=i < 2))


def launch(kernel, x: torch.Tensor, out: torch.Tensor, size: int, step: int = 1) -> None:
    kernel[(triton.cdiv(size, BLOCK),)](x, out, size, step, BLOCK=BLOCK)


def test_a_kernel_that_is_right() -> None:
    memory = torch.arange(30.0).reshape(2, 15)
    out = torch.full((13,), -1.0)
    with checked_bounds() as checked:
        launch(_copy_kernel, memory[1, 1:14], out, 13)
    assert out.equal(memory[1, 1:14])
    assert checked.kernels == {"_copy_kernel": 1}
    assert [(s.lanes, s.kept_out) for s in checked.sites.values()] == [(32, 6)]
    launch(_copy_kernel, memory[0], out, 13)  # as it was, behind the block
    assert out.equal(memory[0, :13])


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (_no_mask_kernel, r"reads x_ptr, element 13 of 13$"),
        (_off_by_one_kernel, r"writes out_ptr, element 13 of 13$"),
        (_before_kernel, r"program \(0, 0, 0\), .* reads x_ptr, element -1 of 13$"),
    ],
)
def test_a_mask_that_is_missing_or_wrong(kernel, said: str) -> None:
    """Both tensors lie within one allocation, where an address alone says nothing."""
    memory = torch.zeros(64)
    with checked_bounds(), pytest.raises(BoundsError, match=said) as raised:
        launch(kernel, memory[10:23], memory[23:36], 13)
    assert str(raised.value).startswith(f"{kernel.fn.__name__}, program (")
    assert "test_triton_bounds.py:" in str(raised.value)
    assert memory[36:].eq(0).all(), "it is said before anything is written"


def test_a_wrong_stride() -> None:
    x, out = torch.zeros(13, 2), torch.zeros(13)
    with checked_bounds():
        launch(_copy_kernel, x[:, 0], out, 13, 2)
        with pytest.raises(BoundsError, match=r"reads x_ptr, gap 3 of 25$"):
            launch(_copy_kernel, x[:, 0], out, 13, 3)


def test_a_store_into_a_gap() -> None:
    x, out = torch.ones(13), torch.zeros(13, 2)
    with checked_bounds(), pytest.raises(BoundsError, match=r"writes out_ptr, gap 1 of 25$"):
        launch(_copy_kernel, x, out[:, 1], 13)
    assert out.eq(0).all()


def test_an_atomic_operation() -> None:
    x, out = torch.ones(26), torch.zeros(13)
    with checked_bounds():
        launch(_atomic_kernel, x, out, 13)
        assert out.eq(1).all()
        with pytest.raises(BoundsError, match=r"reads out_ptr, element 14 of 13$"):
            launch(_atomic_kernel, x, out, 13, 2)


def test_pointers_of_two_tensors() -> None:
    x, out = torch.zeros(5), torch.zeros(8)
    with checked_bounds():
        launch(_picked_kernel, x, out, 5)
        assert torch.cat([x, out]).tolist() == [1.0] * 5 + [0.0] * 5 + [1.0] * 3
        with pytest.raises(BoundsError, match=r"x_ptr, element 5 of 5 or out_ptr, element"):
            launch(_picked_kernel, x, out, 6)


def test_a_tuple_of_pointers() -> None:
    tensors = (torch.zeros(8), torch.zeros(7))
    with checked_bounds(), pytest.raises(BoundsError, match=r"x_ptrs\[1\], element 7 of 7$"):
        _pointers_kernel[(1,)](tensors, 8, BLOCK=BLOCK)
    assert tensors[0].eq(1).all() and tensors[1].eq(0).all()


def test_an_empty_tensor_has_no_element() -> None:
    with checked_bounds(), pytest.raises(BoundsError, match=r"reads x_ptr, element 0 of 0$"):
        launch(_copy_kernel, torch.zeros(3)[:0], torch.zeros(1), 1)


def test_an_address_that_no_argument_has() -> None:
    x = torch.zeros(8)
    table = torch.tensor([x.data_ptr()])
    said = r"writes memory of no fp32 among its tensors$"
    with checked_bounds(), pytest.raises(BoundsError, match=said):
        _table_kernel[(1,)](table, 8, DTYPE=tl.float32, BLOCK=BLOCK)
    assert x.eq(0).all()


def test_a_promise_that_is_not_kept() -> None:
    x = torch.zeros(8)
    with checked_bounds():
        launch(_promise_kernel, x, x, 1)
        with pytest.raises(BoundsError, match=r"^_promise_kernel: no multiple of 16 at .*py:\d+$"):
            launch(_promise_kernel, x[1:], x, 1)


def test_what_is_kept_out_is_no_zero() -> None:
    x, out, flags = torch.ones(4), torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    with checked_bounds():
        _kept_out_kernel[(1,)](x, out, flags, BLOCK=4)
    assert out.isnan().tolist() == [False, False, True, True]
    assert flags.tolist() == [0, 0, 2**31 - 1, 2**31 - 1]


def gradients() -> list[torch.Tensor]:
    """Two that share an allocation, one in channels_last, with a gap between."""
    memory = torch.ones(400)
    image = torch.ones(1, 3, 4, 5).to(memory_format=torch.channels_last)
    return [memory[:103], memory[105:208], image]


def test_what_a_table_lists() -> None:
    grads = gradients()
    with checked_bounds() as checked:
        ops.update_grads_(grads, torch.full((3,), 0.5), backend="triton")
    assert checked.kernels == {"_update_grads_kernel": 2}
    assert all(grad.eq(0.5).all() for grad in grads)


@pytest.mark.parametrize(("call", "said"), [(0, "reads"), (3, "writes")])
def test_beyond_a_tensor_of_a_table(call: int, said: str) -> None:
    """The loads of gradient, parameter and anchor come before the store."""
    match = rf"^_update_grads_kernel, program \(0, 0, 0\), _update.py:\d+ {said} grads\[0\], "
    match += "element 103 of 103$"
    with (
        dropped_mask("mmfuse.triton._update", "_update_tile", call),
        checked_bounds(),
        pytest.raises(BoundsError, match=match),
    ):
        ops.update_grads_(gradients(), torch.full((3,), 0.5), backend="triton")
