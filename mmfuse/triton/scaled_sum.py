"""Sum of two tensors, the second one scaled: one program per block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._tensor_list import launch_on

BLOCK_SIZE = 1024
NUM_WARPS = 4


@triton.jit
def _scaled_sum_kernel(out_ptr, a_ptr, b_ptr, factor_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    """Writes a + factor * b for one block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = i < n_elements
    b = tl.load(factor_ptr) * tl.load(b_ptr + i, mask=mask)
    tl.store(out_ptr + i, tl.load(a_ptr + i, mask=mask) + b, mask=mask)


def scaled_sum(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """See `mmfuse.ops.scaled_sum`."""
    out = torch.empty_like(a)
    if a.numel():
        with launch_on(a.device):
            _scaled_sum_kernel[(triton.cdiv(a.numel(), BLOCK_SIZE),)](
                out,
                a,
                b,
                factor,
                a.numel(),
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return out
