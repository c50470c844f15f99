"""New state in the place of the old, where the step counts: one launch for up to eight tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import not_finite
from ._tensor_list import launch_on

BLOCK_SIZE = 128
NUM_WARPS = 4
#: Tensors of a launch.
MOST = 8
# By the bytes of an element: it is moved, whatever it means.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _keep(state_ptr, values_ptr, size, counts, BLOCK_SIZE: tl.constexpr):
    """The block's part of one tensor if `counts` is 1; nothing where the launch has no tensor."""
    if state_ptr is not None:
        i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        here = i < size * counts
        tl.store(state_ptr + i, tl.load(values_ptr + i, mask=here), mask=here)


_POINTERS = [f"{kind}{i}_ptr" for i in range(MOST) for kind in ("state", "values")]
_SIZES = [f"size{i}" for i in range(MOST)]


@triton.jit(do_not_specialize=[*_POINTERS, *_SIZES, "finite_ptr", "sums_ptr", "n_sums"])
def _keep_state_kernel(
    state0_ptr,
    values0_ptr,
    state1_ptr,
    values1_ptr,
    state2_ptr,
    values2_ptr,
    state3_ptr,
    values3_ptr,
    state4_ptr,
    values4_ptr,
    state5_ptr,
    values5_ptr,
    state6_ptr,
    values6_ptr,
    state7_ptr,
    values7_ptr,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    finite_ptr,
    sums_ptr,
    n_sums,
    BLOCK_SIZE: tl.constexpr,
):
    """Every block looks at all sums, and then keeps its part of every tensor."""
    counts = (tl.load(finite_ptr) != 0).to(tl.int32)
    if sums_ptr is not None:
        bad = tl.zeros((BLOCK_SIZE,), tl.int32)
        for start in range(0, n_sums, BLOCK_SIZE):
            t = start + tl.arange(0, BLOCK_SIZE)
            bad += not_finite(tl.load(sums_ptr + t, mask=t < n_sums, other=0.0)).to(tl.int32)
        counts *= (tl.sum(bad, 0) == 0).to(tl.int32)
    _keep(state0_ptr, values0_ptr, size0, counts, BLOCK_SIZE)
    _keep(state1_ptr, values1_ptr, size1, counts, BLOCK_SIZE)
    _keep(state2_ptr, values2_ptr, size2, counts, BLOCK_SIZE)
    _keep(state3_ptr, values3_ptr, size3, counts, BLOCK_SIZE)
    _keep(state4_ptr, values4_ptr, size4, counts, BLOCK_SIZE)
    _keep(state5_ptr, values5_ptr, size5, counts, BLOCK_SIZE)
    _keep(state6_ptr, values6_ptr, size6, counts, BLOCK_SIZE)
    _keep(state7_ptr, values7_ptr, size7, counts, BLOCK_SIZE)


def keep_state_(
    state: Sequence[Tensor], values: Sequence[Tensor], finite: Tensor, sums: Tensor | None
) -> None:
    """See `mmfuse.ops.keep_state_`."""
    for first in range(0, len(state), MOST):
        some = slice(first, first + MOST)
        _launch(state[some], values[some], finite, sums)


def _launch(
    state: Sequence[Tensor], values: Sequence[Tensor], finite: Tensor, sums: Tensor | None
) -> None:
    rest = MOST - len(state)
    state = [_integers(x) for x in state]
    values = [_integers(x) for x in values]
    sizes = [x.numel() for x in state]
    blocks = max(1, triton.cdiv(max(sizes), BLOCK_SIZE))
    with launch_on(finite.device):
        _keep_state_kernel[(blocks,)](
            *[x for pair in zip(state, values, strict=True) for x in pair],
            *[None] * (2 * rest),
            *sizes,
            *[0] * rest,
            _integers(finite),
            sums,
            0 if sums is None else sums.numel(),
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )


def _integers(tensor: Tensor) -> Tensor:
    """The memory as integers, which Triton has of every width; of complex128 two each."""
    if tensor.dtype is torch.complex128:
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.itemsize])
