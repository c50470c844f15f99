"""In-place update of a list of gradients: one launch per group of dtypes, one more for sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._tensor_list import (
    ANCHOR,
    FIRST_CHUNK,
    GRAD,
    NOISE_ID,
    NOISE_OFFSET,
    NUMEL,
    PARAM,
    ROW_ORDER,
    TRITON_DTYPES,
    TableCache,
    find_chunk,
    group_constants,
    launch_on,
    load_pointer,
    row_of,
)
from ._update import BLOCK_SIZE, CHUNK_SIZE, NUM_WARPS, update_chunk

MERGE_BLOCK = 512
MERGE_WARPS = 4

_tables = TableCache(CHUNK_SIZE)


@triton.jit(
    do_not_specialize=[
        "first_chunk", "scale_ptr", "pull_ptr", "noise_std_ptr", "noise_state_ptr", "finite_ptr",
        "partials_ptr",
    ]
)  # fmt: skip
def _update_grads_kernel(
    rows_ptr,
    chunk_rows_ptr,
    first_chunk,
    scale_ptr,
    pull_ptr,
    noise_std_ptr,
    noise_state_ptr,
    finite_ptr,
    partials_ptr,
    GRAD_DTYPE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Updates one chunk; all pointers from pull_ptr on may be None, the noise's together.

    With partials_ptr, one float64 for each chunk, it also writes the sum of squares of what was.
    """
    chunk, slot, row_ptr = find_chunk(rows_ptr, chunk_rows_ptr, first_chunk)
    scale = tl.load(scale_ptr + slot).to(ACC)
    write = scale != 1
    param_ptr = None
    anchor_ptr = None
    pull = None
    if pull_ptr is not None:
        param_ptr = load_pointer(row_ptr, PARAM, PARAM_DTYPE, ALIGNED)
        if ANCHOR_DTYPE is not None:
            anchor_ptr = load_pointer(row_ptr, ANCHOR, ANCHOR_DTYPE, ALIGNED)
        pull = tl.load(pull_ptr + slot).to(ACC)
        write = write | (pull != 0)
    noise_std = None
    noise_id = None
    noise_offset = None
    if noise_std_ptr is not None:
        noise_std = tl.load(noise_std_ptr + slot).to(ACC)
        noise_id = tl.load(row_ptr + NOISE_ID)
        noise_offset = tl.load(row_ptr + NOISE_OFFSET)
        write = write | (noise_std != 0)
    grad_ptr = load_pointer(row_ptr, GRAD, GRAD_DTYPE, ALIGNED)
    update_chunk(
        grad_ptr,
        grad_ptr,
        param_ptr,
        anchor_ptr,
        chunk - tl.load(row_ptr + FIRST_CHUNK),
        tl.load(row_ptr + NUMEL),
        write,
        scale,
        pull,
        noise_std,
        noise_state_ptr,
        noise_id,
        noise_offset,
        tl.load(row_ptr + ROW_ORDER) if TRANSPOSED else None,
        finite_ptr,
        None if partials_ptr is None else partials_ptr + chunk,
        ACC,
        ALIGNED,
        CHUNK_SIZE,
        BLOCK_SIZE,
    )


@triton.jit(do_not_specialize=["sq_norm_ptr"])
def _update_grads_sq_norm_kernel(
    rows_ptr,
    partials_ptr,
    sq_norm_ptr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Adds the sums of one tensor's chunks, always in the same order."""
    slot = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(rows_ptr, slot)
    numel = tl.load(row_ptr + NUMEL)
    # Chunks are counted from the beginning of the noise block of the first element.
    length = numel + (tl.load(row_ptr + NOISE_OFFSET) & 3)
    n_chunks = tl.where(numel > 0, tl.cdiv(length, CHUNK_SIZE), 0)
    first_ptr = partials_ptr + tl.load(row_ptr + FIRST_CHUNK)
    lane = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, n_chunks, BLOCK_SIZE):
        chunk = start + lane
        total += tl.load(first_ptr + chunk, mask=chunk < n_chunks, other=0.0)
    tl.store(sq_norm_ptr + slot, tl.sum(total, axis=0).to(sq_norm_ptr.dtype.element_ty))


def _constants(dtypes: list[tl.dtype], aligned: bool, transposed: bool) -> dict[str, Any]:
    return {
        **group_constants(dtypes, aligned),
        "TRANSPOSED": transposed,
        "CHUNK_SIZE": CHUNK_SIZE,
        "BLOCK_SIZE": BLOCK_SIZE,
    }


def update_grads_(
    grads: Sequence[Tensor],
    scale: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    pull: Tensor | None,
    noise_std: Tensor | None,
    noise_state: Tensor | None,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
    finite: Tensor | None,
    sq_norm: Tensor | None,
) -> None:
    """See `mmfuse.ops.update_grads_`; ids and offsets place each tensor in the noise stream."""
    if not grads:
        return
    if pull is None:
        params, anchors = (), ()
    if noise_std is None:
        noise_ids, noise_offsets = (), ()
    with launch_on(grads[0].device):
        table = _tables.get(grads, params, anchors, noise_ids, noise_offsets)
        partials = None
        if sq_norm is not None:
            partials = sq_norm.new_empty(table.n_chunks, dtype=torch.float64)
        for group in table.groups:
            names = [TRITON_DTYPES[d] for d in group.dtypes]
            _update_grads_kernel[(group.n_chunks,)](
                table.rows,
                table.chunk_rows,
                group.first_chunk,
                scale,
                pull,
                noise_std,
                noise_state,
                None if finite is None else finite.view(torch.uint8),
                partials,
                **_constants(names, group.aligned, group.transposed),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
        if sq_norm is not None:
            _update_grads_sq_norm_kernel[(len(grads),)](
                table.rows,
                partials,
                sq_norm,
                CHUNK_SIZE=CHUNK_SIZE,
                BLOCK_SIZE=MERGE_BLOCK,
                num_warps=MERGE_WARPS,
                **COMPILE_OPTIONS,
            )
