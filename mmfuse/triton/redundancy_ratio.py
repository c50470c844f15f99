"""Mean squared distance of two representations over that of their inputs: two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.redundancy_ratio import EPS
from ._aot import COMPILE_OPTIONS
from ._partials import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    MERGE_BLOCK,
    MERGE_WARPS,
    NUM_WARPS,
    accumulator,
    mean_of,
    squared_distance,
)
from ._tensor_list import launch_on

_EPS = tl.constexpr(EPS)


@triton.jit(do_not_specialize=["partials_ptr", "n_elements"])
def _squared_distance_kernel(
    z1_ptr,
    z2_ptr,
    partials_ptr,
    n_elements: tl.int64,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes the sum of (z1 - z2)^2 over one chunk."""
    DTYPE: tl.constexpr = z1_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK_SIZE
    z1_ptr += start
    z2_ptr += start
    # The interpreter ignores the annotations.
    count = tl.minimum(n_elements.to(tl.int64) - start, CHUNK_SIZE).to(tl.int32)
    lane = tl.arange(0, BLOCK_SIZE)
    total = tl.zeros([BLOCK_SIZE], ACC)
    # A mask would cost the vector loads, so whole tiles go without one.
    n_whole = count // BLOCK_SIZE
    for tile in range(n_whole):
        i = tile * BLOCK_SIZE + lane
        total += squared_distance(tl.load(z1_ptr + i), tl.load(z2_ptr + i), None, ACC)
    for tile in range(n_whole, tl.cdiv(count, BLOCK_SIZE)):
        i = tile * BLOCK_SIZE + lane
        mask = i < count
        z1 = tl.load(z1_ptr + i, mask=mask)
        z2 = tl.load(z2_ptr + i, mask=mask)
        total += squared_distance(z1, z2, mask, ACC)
    tl.store(partials_ptr + chunk, tl.sum(total, axis=0).to(tl.float64))


@triton.jit(
    do_not_specialize=["partials_ptr", "input_sq_ptr", "ratio_ptr", "n_partials", "n_elements"]
)
def _redundancy_ratio_kernel(
    partials_ptr,
    input_sq_ptr,
    ratio_ptr,
    n_partials,
    n_elements: tl.int64,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes the mean over all elements, divided by input_sq."""
    mean = mean_of(partials_ptr, n_partials, n_elements, BLOCK_SIZE)
    ratio = mean / (tl.load(input_sq_ptr).to(tl.float64) + _EPS)
    tl.store(ratio_ptr, ratio.to(ratio_ptr.dtype.element_ty))


def redundancy_ratio(z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    """See `mmfuse.ops.redundancy_ratio`."""
    numel = z1.numel()
    chunks = triton.cdiv(numel, CHUNK_SIZE)
    partials = torch.empty(chunks, dtype=torch.float64, device=z1.device)
    ratio = torch.empty((), dtype=accumulator(z1), device=z1.device)
    with launch_on(z1.device):
        if numel:
            _squared_distance_kernel[(chunks,)](
                z1,
                z2,
                partials,
                numel,
                CHUNK_SIZE=CHUNK_SIZE,
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
        _redundancy_ratio_kernel[(1,)](
            partials,
            input_sq,
            ratio,
            chunks,
            numel,
            BLOCK_SIZE=MERGE_BLOCK,
            num_warps=MERGE_WARPS,
            **COMPILE_OPTIONS,
        )
    return ratio
