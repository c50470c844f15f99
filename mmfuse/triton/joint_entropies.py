"""Exact joint histograms: ranges and bins of each variable, then counts of each tuple."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import widen
from ._partials import accumulator
from ._problems import NUM_WARPS, ProblemSplit, share_of_program, split_problems
from ._tensor_list import launch_on

# Stands in place of the third index of a pair.
_NONE = -1


@triton.jit
def _extreme(a, b, LARGEST: tl.constexpr):
    """Elementwise extreme in which a NaN stays."""
    if LARGEST:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_extremes(lanes, LARGEST: tl.constexpr):
    """Extreme of each row, NaN for a row that holds one."""
    broken = tl.max((lanes != lanes).to(tl.int32), axis=1) != 0
    end = tl.max(lanes, axis=1) if LARGEST else tl.min(lanes, axis=1)
    return tl.where(broken, float("nan"), end)


@triton.jit(do_not_specialize=["lows_ptr", "highs_ptr", "n_rows", "cols_per_program"])
def _ranges_kernel(
    lows_ptr,
    highs_ptr,
    x_ptr,
    n_rows,
    n_cols: tl.int64,
    cols_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes both ends of the range of a share of a few rows, to [P, splits] each."""
    ACC: tl.constexpr = lows_ptr.dtype.element_ty
    row, used, begin, n_own = share_of_program(
        n_rows, n_cols, cols_per_program, BLOCK_ROWS, BLOCK_COLS
    )
    lows = tl.full([BLOCK_ROWS, BLOCK_COLS], float("inf"), ACC)
    highs = tl.full([BLOCK_ROWS, BLOCK_COLS], float("-inf"), ACC)
    x_ptrs = x_ptr + begin[:, None]
    for start in range(0, n_own, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = used[:, None] & (col < n_own)[None, :]
        x = widen(tl.load(x_ptrs + col[None, :], mask=mask, other=0.0), ACC)
        lows = _extreme(lows, tl.where(mask, x, float("inf")), False)
        highs = _extreme(highs, tl.where(mask, x, float("-inf")), True)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(lows_ptr + place, _row_extremes(lows, False), mask=used)
    tl.store(highs_ptr + place, _row_extremes(highs, True), mask=used)


@triton.jit(do_not_specialize=["edges_ptr", "n_rows", "cols_per_program", "bins"])
def _bin_indices_kernel(
    indices_ptr,
    x_ptr,
    edges_ptr,
    n_rows,
    n_cols: tl.int64,
    cols_per_program,
    bins,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes the largest i < bins whose edge is not above x, 0 if there is none."""
    ACC: tl.constexpr = edges_ptr.dtype.element_ty
    row, used, begin, n_own = share_of_program(
        n_rows, n_cols, cols_per_program, BLOCK_ROWS, BLOCK_COLS
    )
    edges_ptrs = edges_ptr + (row * (bins + 1))[:, None]
    x_ptrs = x_ptr + begin[:, None]
    indices_ptrs = indices_ptr + begin[:, None]
    for start in range(0, n_own, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = used[:, None] & (col < n_own)[None, :]
        x = widen(tl.load(x_ptrs + col[None, :], mask=mask, other=0.0), ACC)
        # Bisection finds it: where the range is a few ulps, no guess would be near.
        index = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32)
        for step in tl.static_range(STEPS):
            higher = index + (1 << (STEPS - 1 - step))
            known = mask & (higher < bins)
            edge = tl.load(edges_ptrs + higher, mask=known, other=0.0)
            index = tl.where(known & (edge <= x), higher, index)
        tl.store(indices_ptrs + col[None, :], index.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["valid_ptr", "n_rows", "cols_per_program", "i", "j", "k", "bins"])
def _joint_counts_kernel(
    counts_ptr,
    indices_ptr,
    valid_ptr,
    n_rows,
    n_cols: tl.int64,
    cols_per_program,
    i,
    j,
    k,
    bins,
    ORDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Counts the cells of variables i, j and, for order 3, k, in rows where all are valid."""
    row, used, begin, n_own = share_of_program(
        n_rows, n_cols, cols_per_program, BLOCK_ROWS, BLOCK_COLS
    )
    # The variables follow one another.
    i = i.to(tl.int64) * n_rows
    j = j.to(tl.int64) * n_rows
    used = used & (tl.load(valid_ptr + i + row, mask=used, other=0) != 0)
    used = used & (tl.load(valid_ptr + j + row, mask=used, other=0) != 0)
    first_ptrs = indices_ptr + (i * n_cols + begin)[:, None]
    second_ptrs = indices_ptr + (j * n_cols + begin)[:, None]
    n_cells = bins * bins
    if ORDER == 3:
        k = k.to(tl.int64) * n_rows
        used = used & (tl.load(valid_ptr + k + row, mask=used, other=0) != 0)
        third_ptrs = indices_ptr + (k * n_cols + begin)[:, None]
        n_cells = n_cells * bins
    counts_ptrs = counts_ptr + (row * n_cells)[:, None]
    one = tl.full([BLOCK_ROWS, BLOCK_COLS], 1, tl.int64)
    for start in range(0, n_own, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = used[:, None] & (col < n_own)[None, :]
        col = col[None, :]
        cell = tl.load(first_ptrs + col, mask=mask, other=0).to(tl.int32) * bins
        cell += tl.load(second_ptrs + col, mask=mask, other=0).to(tl.int32)
        if ORDER == 3:
            cell = cell * bins + tl.load(third_ptrs + col, mask=mask, other=0).to(tl.int32)
        tl.atomic_add(counts_ptrs + cell, one, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["entropies_ptr", "n_tables", "n_cells", "stride"])
def _entropies_kernel(
    entropies_ptr,
    counts_ptr,
    n_tables,
    n_cells,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes ln n - sum c ln c / n of a few tables of counts, at least 0; NaN for n = 0."""
    table = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    used = table < n_tables
    table_ptrs = counts_ptr + (table * n_cells)[:, None]
    weighted = tl.zeros([BLOCK_ROWS], tl.float64)
    n = tl.zeros([BLOCK_ROWS], tl.int64)
    for start in range(0, n_cells, BLOCK_COLS):
        cell = start + tl.arange(0, BLOCK_COLS)
        mask = used[:, None] & (cell < n_cells)[None, :]
        count = tl.load(table_ptrs + cell[None, :], mask=mask, other=0)
        n += tl.sum(count, axis=1)
        # 1 ln 1 is the 0 that 0 ln 0 stands for.
        c = tl.maximum(count, 1).to(tl.float64)
        weighted += tl.sum(c * tl.log(c), axis=1)
    total = n.to(tl.float64)
    entropy = tl.log(total) - weighted / total
    tl.store(entropies_ptr + table * stride, tl.where(entropy < 0, 0.0, entropy), mask=used)


def row_ranges(data: Sequence[Tensor], split: ProblemSplit) -> tuple[Tensor, Tensor]:
    """Both ends of the range of every row, [K, P] each; NaN for a row that holds one."""
    first = data[0]
    n_rows, n_cols = first.shape
    shape = (2, len(data), n_rows, split.splits)
    partials = torch.empty(shape, dtype=accumulator(first), device=first.device)
    for k, x in enumerate(data):
        _ranges_kernel[split.grid](
            *partials[:, k],
            x,
            n_rows,
            n_cols,
            split.cols_per_program,
            **split.constants(),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    lows, highs = partials
    return lows.amin(-1), highs.amax(-1)


def _bin_edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """[..., bins + 1] edges, rounded as in the reference.

    PyTorch's elementwise operators round every step; one kernel would fuse the product and the sum.
    """
    half = torch.where(low == high, 0.5, 0.0).to(low.dtype)
    low, high = (low - half).unsqueeze(-1), (high + half).unsqueeze(-1)
    width = high - low
    # On the device, because there PyTorch multiplies by the reciprocal of a number of the host.
    n = torch.full((), bins, dtype=low.dtype, device=low.device)
    step = width / n
    i = torch.arange(bins, dtype=low.dtype, device=low.device)
    rises = torch.where(step == 0, (i / n) * width, i * step)
    return torch.cat([rises + low, high], dim=-1)


def _bin_indices(
    data: Sequence[Tensor], ranges: tuple[Tensor, Tensor], split: ProblemSplit, bins: int
) -> tuple[Tensor, Tensor]:
    """Each value's bin, [K, P, N] uint8, and whether its row has a finite range, [K, P]."""
    first = data[0]
    n_rows, n_cols = first.shape
    low, high = ranges
    valid = (high - low).isfinite()
    edges = _bin_edges(torch.where(valid, low, 0), torch.where(valid, high, 0), bins)
    indices = torch.empty((len(data), n_rows, n_cols), dtype=torch.uint8, device=first.device)
    for k, x in enumerate(data):
        _bin_indices_kernel[split.grid](
            indices[k],
            x,
            edges[k],
            n_rows,
            n_cols,
            split.cols_per_program,
            bins,
            STEPS=(bins - 1).bit_length(),
            **split.constants(),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return indices, valid


def _entropies(counts: Tensor, order: int, bins: int) -> Tensor:
    """Entropies of all margins of the tables of counts [Q, P, bins^order]."""
    n_tables, n_margins = counts.shape[0] * counts.shape[1], 2**order - 1
    shape = (*counts.shape[:2], n_margins)
    entropies = torch.empty(shape, dtype=torch.float64, device=counts.device)
    cube = counts.unflatten(-1, [bins] * order)
    for mask in range(1, n_margins + 1):
        others = [2 + k for k in range(order) if not mask >> k & 1]
        margin = cube.sum(others) if others else cube
        n_cells = bins ** mask.bit_count()
        split = split_problems(n_tables, n_cells)
        _entropies_kernel[(split.row_tiles,)](
            entropies[..., mask - 1 :],
            margin,
            n_tables,
            n_cells,
            n_margins,
            **split.constants(),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return entropies


def count_tuples(
    data: Sequence[Tensor],
    ranges: tuple[Tensor, Tensor],
    split: ProblemSplit,
    tuples: Sequence[int],
    order: int,
    bins: int,
) -> tuple[Tensor, Tensor]:
    """Entropies and counts of the tuples, given the rows' ranges; on the data's device."""
    n_rows, n_cols = data[0].shape
    shape = (len(tuples) // order, n_rows, bins**order)
    counts = torch.zeros(shape, dtype=torch.int64, device=data[0].device)
    indices, valid = _bin_indices(data, ranges, split, bins)
    for q, table in enumerate(counts):
        members = tuples[q * order : (q + 1) * order]
        _joint_counts_kernel[split.grid](
            table,
            indices,
            valid.view(torch.uint8),
            n_rows,
            n_cols,
            split.cols_per_program,
            *members,
            *[_NONE] * (3 - order),
            bins,
            ORDER=order,
            **split.constants(),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return _entropies(counts, order, bins), counts


def joint_entropies(
    data: Sequence[Tensor], tuples: Sequence[int], order: int, bins: int
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.joint_entropies`."""
    split = split_problems(*data[0].shape)
    with launch_on(data[0].device):
        return count_tuples(data, row_ranges(data, split), split, tuples, order, bins)
