"""The backward pass of `scale_grad`: one launch over one tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._tensor_list import launch_on
from ._update import BLOCK_SIZE, CHUNK_SIZE, NUM_WARPS, update_chunk


@triton.jit(
    do_not_specialize=[
        "n_elements", "coefficient_ptr", "noise_std_ptr", "noise_state_ptr", "noise_id",
        "noise_offset",
    ]
)  # fmt: skip
def _scale_grad_backward_kernel(
    out_ptr,
    grad_ptr,
    n_elements: tl.int64,
    coefficient_ptr,
    noise_std_ptr,
    noise_state_ptr,
    noise_id: tl.int64,
    noise_offset: tl.int64,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes coefficient g + noise_std N(0, 1) for one chunk; noise_std_ptr may be None."""
    noise_std = None
    if noise_std_ptr is not None:
        noise_std = tl.load(noise_std_ptr).to(ACC)
    update_chunk(
        out_ptr,
        grad_ptr,
        None,
        None,
        tl.program_id(0).to(tl.int64),
        # The interpreter ignores the annotations.
        n_elements.to(tl.int64),
        True,
        tl.load(coefficient_ptr).to(ACC),
        None,
        noise_std,
        noise_state_ptr,
        noise_id.to(tl.int64),
        noise_offset.to(tl.int64),
        None,
        None,
        None,
        ACC,
        ALIGNED,
        CHUNK_SIZE,
        BLOCK_SIZE,
    )


def _constants(wide: bool, aligned: bool) -> dict[str, Any]:
    return {
        "ACC": tl.float64 if wide else tl.float32,
        "ALIGNED": aligned,
        "CHUNK_SIZE": CHUNK_SIZE,
        "BLOCK_SIZE": BLOCK_SIZE,
    }


def scale_grad_backward(
    grad: Tensor,
    coefficient: Tensor,
    noise_std: Tensor | None,
    noise_state: Tensor | None,
    noise_id: int,
    noise_offset: int,
) -> Tensor:
    """See `mmfuse.ops.scale_grad`."""
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    numel = grad.numel()
    if numel == 0:
        return out
    shift = noise_offset % 4 if noise_std is not None else 0
    aligned = shift == 0 and grad.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    with launch_on(grad.device):
        _scale_grad_backward_kernel[(triton.cdiv(numel + shift, CHUNK_SIZE),)](
            out,
            grad,
            numel,
            coefficient,
            noise_std,
            noise_state,
            noise_id,
            noise_offset,
            **_constants(grad.dtype == torch.float64, aligned),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return out
