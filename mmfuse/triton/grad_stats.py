"""Moments of a list of gradients: one launch per group of dtypes, and one that merges chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import widen
from ._tensor_list import (
    ANCHOR,
    FIRST_CHUNK,
    GRAD,
    NUMEL,
    PARAM,
    TRITON_DTYPES,
    TableCache,
    find_chunk,
    group_constants,
    launch_on,
    load_pointer,
    row_of,
)

CHUNK_SIZE = 4096
CHUNK_WARPS = 4
MERGE_BLOCK = 512
MERGE_WARPS = 4

_tables = TableCache(CHUNK_SIZE)


@triton.jit
def _load(pointer, offsets, count, ACC: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return widen(tl.load(pointer + offsets, mask=offsets < count, other=0.0), ACC)
    return widen(tl.load(pointer + offsets), ACC)


@triton.jit
def _chunk_moments(
    row_ptr,
    start,
    count,
    partial_ptr,
    GRAD_DTYPE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
):
    offsets = tl.arange(0, CHUNK_SIZE)
    grad = load_pointer(row_ptr, GRAD, GRAD_DTYPE, ALIGNED) + start
    g = _load(grad, offsets, count, ACC, MASKED)
    n = count.to(ACC)
    # An approximate mean first, then what it missed: the pair is good to the bits below the
    # mean's own last place, and no finite chunk overflows.
    center = tl.sum(g * (1.0 / n), axis=0)
    d = g - center
    if MASKED:
        d = tl.where(offsets < count, d, 0.0)
    missed = tl.sum(d, axis=0).to(tl.float64)
    squares = tl.sum(d * d, axis=0).to(tl.float64)
    n = count.to(tl.float64)
    m2 = squares - missed * missed / n
    tl.store(partial_ptr, center.to(tl.float64) + missed / n)
    tl.store(partial_ptr + 1, tl.where(m2 < 0, 0.0, m2))
    if PARAM_DTYPE is not None:
        param = load_pointer(row_ptr, PARAM, PARAM_DTYPE, ALIGNED) + start
        displacement = _load(param, offsets, count, ACC, MASKED)
        if ANCHOR_DTYPE is not None:
            anchor = load_pointer(row_ptr, ANCHOR, ANCHOR_DTYPE, ALIGNED) + start
            displacement -= _load(anchor, offsets, count, ACC, MASKED)
        tl.store(partial_ptr + 2, tl.sum(displacement * g, axis=0).to(tl.float64))
        tl.store(partial_ptr + 3, tl.sum(displacement * displacement, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["first_chunk"])
def _grad_stats_chunk_kernel(
    rows_ptr,
    chunk_rows_ptr,
    partials_ptr,
    first_chunk,
    GRAD_DTYPE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
):
    """Writes (mean, m2[, dot, disp_sq]) of one chunk as float64."""
    chunk, _, row_ptr = find_chunk(rows_ptr, chunk_rows_ptr, first_chunk)
    start = (chunk - tl.load(row_ptr + FIRST_CHUNK)) * CHUNK_SIZE
    count = tl.minimum(tl.load(row_ptr + NUMEL) - start, CHUNK_SIZE).to(tl.int32)
    partial_ptr = partials_ptr + chunk * (2 if PARAM_DTYPE is None else 4)
    # A mask would cost the vector loads, so only a tensor's last chunk has one.
    if count == CHUNK_SIZE:
        _chunk_moments(
            row_ptr, start, count, partial_ptr, GRAD_DTYPE, PARAM_DTYPE, ANCHOR_DTYPE, ACC,
            ALIGNED, False, CHUNK_SIZE,
        )  # fmt: skip
    else:
        _chunk_moments(
            row_ptr, start, count, partial_ptr, GRAD_DTYPE, PARAM_DTYPE, ANCHOR_DTYPE, ACC,
            ALIGNED, True, CHUNK_SIZE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tensors"])
def _grad_stats_merge_kernel(
    rows_ptr,
    partials_ptr,
    numel_ptr,
    moments_ptr,
    n_tensors,
    WITH_PARAMS: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Merges the chunks of one tensor, always in the same order."""
    slot = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(rows_ptr, slot)
    numel = tl.load(row_ptr + NUMEL)
    n_chunks = tl.cdiv(numel, CHUNK_SIZE)
    WIDTH: tl.constexpr = 4 if WITH_PARAMS else 2
    first_ptr = partials_ptr + tl.load(row_ptr + FIRST_CHUNK) * WIDTH
    lane = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    total = tl.maximum(numel, 1).to(tl.float64)

    mean_sum = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, n_chunks, BLOCK_SIZE):
        chunk = start + lane
        size = tl.minimum(numel - chunk * CHUNK_SIZE, CHUNK_SIZE).to(tl.float64)
        mean = tl.load(first_ptr + chunk * WIDTH, mask=chunk < n_chunks, other=0.0)
        mean_sum += tl.where(chunk < n_chunks, mean * (size / total), 0.0)
    mean_all = tl.sum(mean_sum, axis=0)

    m2_sum = tl.zeros([BLOCK_SIZE], tl.float64)
    dot_sum = tl.zeros([BLOCK_SIZE], tl.float64)
    disp_sum = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, n_chunks, BLOCK_SIZE):
        chunk = start + lane
        used = chunk < n_chunks
        size = tl.minimum(numel - chunk * CHUNK_SIZE, CHUNK_SIZE).to(tl.float64)
        partial_ptr = first_ptr + chunk * WIDTH
        delta = tl.load(partial_ptr, mask=used, other=0.0) - mean_all
        m2 = tl.load(partial_ptr + 1, mask=used, other=0.0)
        m2_sum += tl.where(used, m2 + size * delta * delta, 0.0)
        if WITH_PARAMS:
            dot_sum += tl.load(partial_ptr + 2, mask=used, other=0.0)
            disp_sum += tl.load(partial_ptr + 3, mask=used, other=0.0)

    out = moments_ptr.dtype.element_ty
    tl.store(numel_ptr + slot, numel)
    tl.store(moments_ptr + slot, mean_all.to(out))
    tl.store(moments_ptr + n_tensors + slot, tl.sum(m2_sum, axis=0).to(out))
    if WITH_PARAMS:
        tl.store(moments_ptr + 2 * n_tensors + slot, tl.sum(dot_sum, axis=0).to(out))
        tl.store(moments_ptr + 3 * n_tensors + slot, tl.sum(disp_sum, axis=0).to(out))


def _chunk_constants(dtypes: list[tl.dtype], aligned: bool) -> dict[str, Any]:
    return {
        **group_constants(dtypes, aligned),
        "CHUNK_SIZE": CHUNK_SIZE,
    }


def _merge_constants(with_params: bool) -> dict[str, Any]:
    return {"WITH_PARAMS": with_params, "CHUNK_SIZE": CHUNK_SIZE, "BLOCK_SIZE": MERGE_BLOCK}


def grad_stats(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.grad_stats`; moments are [2, T], or [4, T] with params."""
    width = 4 if params else 2
    wide = any(g.dtype == torch.float64 for g in grads)
    dtype = torch.float64 if wide else torch.float32
    device = grads[0].device if grads else None
    numel = torch.empty(len(grads), dtype=torch.int64, device=device)
    moments = torch.empty((width, len(grads)), dtype=dtype, device=device)
    if device is None:
        return numel, moments
    with launch_on(device):
        table = _tables.get(grads, params, anchors)
        partials = torch.empty(table.n_chunks * width, dtype=torch.float64, device=device)
        for group in table.groups:
            names = [TRITON_DTYPES[d] for d in group.dtypes]
            _grad_stats_chunk_kernel[(group.n_chunks,)](
                table.rows,
                table.chunk_rows,
                partials,
                group.first_chunk,
                **_chunk_constants(names, group.aligned),
                num_warps=CHUNK_WARPS,
                **COMPILE_OPTIONS,
            )
        _grad_stats_merge_kernel[(len(grads),)](
            table.rows,
            partials,
            numel,
            moments,
            len(grads),
            **_merge_constants(bool(params)),
            num_warps=MERGE_WARPS,
            **COMPILE_OPTIONS,
        )
    return numel, moments
