"""Joint histogram with triangular bins: one launch of atomic additions; backward one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import divide, not_finite, round_to, widen
from ._partials import accumulator
from ._problems import NUM_WARPS, share_of_program, split_problems
from ._tensor_list import launch_on


@triton.jit
def _scale_of(range_ptr, row, used, bins):
    """Lower end of each row's range, and bins per unit."""
    low = tl.load(range_ptr + 2 * row, mask=used, other=0.0)
    high = tl.load(range_ptr + 2 * row + 1, mask=used, other=1.0)
    width = high - low
    # Rounded, so that it moves no value across a centre.
    return low[:, None], divide(tl.zeros_like(width) + (bins - 1), width)[:, None]


@triton.jit
def _position(x, low, per_unit, bins):
    """Lower of the two bins, int32, and the upper one's share, which is NaN where x has none."""
    t = (x - low) * per_unit
    # In comparisons a NaN stays as it is, and is not converted to an integer.
    t = tl.where(t < 0, 0.0, t)
    t = tl.where(t > bins - 1, (bins - 1).to(t.dtype), t)
    lower = tl.minimum(tl.where(t == t, t, 0.0).to(tl.int32), bins - 2)
    return lower, t - lower.to(t.dtype)


@triton.jit(
    do_not_specialize=[
        "table_ptr", "broken_ptr", "x_range_ptr", "y_range_ptr", "present_ptr", "n_rows",
        "cols_per_program", "bins",
    ]
)  # fmt: skip
def _soft_histogram_kernel(
    table_ptr,
    broken_ptr,
    x_ptr,
    y_ptr,
    x_range_ptr,
    y_range_ptr,
    present_ptr,
    n_rows,
    n_cols: tl.int64,
    cols_per_program,
    bins,
    MASKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Adds each value's shares to float64 tables; marks rows in which a value has none."""
    ACC: tl.constexpr = x_range_ptr.dtype.element_ty
    row, used, begin, n_own = share_of_program(
        n_rows, n_cols, cols_per_program, BLOCK_ROWS, BLOCK_COLS
    )
    x_low, x_per_unit = _scale_of(x_range_ptr, row, used, bins)
    y_low, y_per_unit = _scale_of(y_range_ptr, row, used, bins)
    x_ptrs = x_ptr + begin[:, None]
    y_ptrs = y_ptr + begin[:, None]
    table_ptrs = table_ptr + (row * bins * bins)[:, None]
    broken = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, n_own, BLOCK_COLS):
        col = (start + tl.arange(0, BLOCK_COLS))[None, :]
        mask = used[:, None] & (col < n_own)
        if MASKED:
            mask = mask & (tl.load(present_ptr + begin[:, None] + col, mask=mask, other=0) != 0)
        x = widen(tl.load(x_ptrs + col, mask=mask, other=0.0), ACC)
        y = widen(tl.load(y_ptrs + col, mask=mask, other=0.0), ACC)
        i, f = _position(x, x_low, x_per_unit, bins)
        j, g = _position(y, y_low, y_per_unit, bins)
        lost = not_finite(f) | not_finite(g)
        broken = tl.maximum(broken, tl.max((mask & lost).to(tl.int32), axis=1))
        mask = mask & (lost == 0)
        f = f.to(tl.float64)
        g = g.to(tl.float64)
        cell = table_ptrs + i * bins + j
        tl.atomic_add(cell, (1 - f) * (1 - g), mask=mask, sem="relaxed")
        tl.atomic_add(cell + 1, (1 - f) * g, mask=mask, sem="relaxed")
        tl.atomic_add(cell + bins, f * (1 - g), mask=mask, sem="relaxed")
        tl.atomic_add(cell + bins + 1, f * g, mask=mask, sem="relaxed")
    tl.store(broken_ptr + row, tl.full([BLOCK_ROWS], 1, tl.uint8), mask=used & (broken != 0))


@triton.jit(
    do_not_specialize=[
        "partials_ptr", "grad_ptr", "x_range_ptr", "y_range_ptr", "present_ptr", "n_rows",
        "cols_per_program", "bins",
    ]
)  # fmt: skip
def _soft_histogram_backward_kernel(
    grad_x_ptr,
    grad_y_ptr,
    partials_ptr,
    grad_ptr,
    x_ptr,
    y_ptr,
    x_range_ptr,
    y_range_ptr,
    present_ptr,
    n_rows,
    n_cols: tl.int64,
    cols_per_program,
    bins,
    MASKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes the slopes, and to [4, P, splits] the sums that the ranges' gradients consist of."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = x_range_ptr.dtype.element_ty
    row, used, begin, n_own = share_of_program(
        n_rows, n_cols, cols_per_program, BLOCK_ROWS, BLOCK_COLS
    )
    x_low, x_per_unit = _scale_of(x_range_ptr, row, used, bins)
    y_low, y_per_unit = _scale_of(y_range_ptr, row, used, bins)
    begin = begin[:, None]
    grad_ptrs = grad_ptr + (row * bins * bins)[:, None]
    x_low_sum = tl.zeros([BLOCK_ROWS], tl.float64)
    x_high_sum = tl.zeros([BLOCK_ROWS], tl.float64)
    y_low_sum = tl.zeros([BLOCK_ROWS], tl.float64)
    y_high_sum = tl.zeros([BLOCK_ROWS], tl.float64)
    for start in range(0, n_own, BLOCK_COLS):
        col = (start + tl.arange(0, BLOCK_COLS))[None, :]
        own = used[:, None] & (col < n_own)
        mask = own
        if MASKED:
            mask = own & (tl.load(present_ptr + begin + col, mask=own, other=0) != 0)
        x = widen(tl.load(x_ptr + begin + col, mask=mask, other=0.0), ACC)
        y = widen(tl.load(y_ptr + begin + col, mask=mask, other=0.0), ACC)
        i, f = _position(x, x_low, x_per_unit, bins)
        j, g = _position(y, y_low, y_per_unit, bins)
        cell = grad_ptrs + i * bins + j
        g00 = tl.load(cell, mask=mask, other=0.0)
        g01 = tl.load(cell + 1, mask=mask, other=0.0)
        g10 = tl.load(cell + bins, mask=mask, other=0.0)
        g11 = tl.load(cell + bins + 1, mask=mask, other=0.0)
        by_f = (1 - g) * (g10 - g00) + g * (g11 - g01)
        by_g = (1 - f) * (g01 - g00) + f * (g11 - g10)
        slope_x = round_to(by_f * x_per_unit, DTYPE)
        slope_y = round_to(by_g * y_per_unit, DTYPE)
        if MASKED:
            slope_x = tl.where(mask, slope_x, tl.zeros_like(slope_x))
            slope_y = tl.where(mask, slope_y, tl.zeros_like(slope_y))
        tl.store(grad_x_ptr + begin + col, slope_x, mask=own)
        tl.store(grad_y_ptr + begin + col, slope_y, mask=own)
        by_f = tl.where(mask, by_f, 0.0)
        by_g = tl.where(mask, by_g, 0.0)
        # Positions relative to the upper end, and to the lower.
        s = tl.where(mask, f + (i - (bins - 1)).to(ACC), 0.0)
        x_low_sum += tl.sum(by_f * s, axis=1).to(tl.float64)
        s = tl.where(mask, f + i.to(ACC), 0.0)
        x_high_sum += tl.sum(by_f * s, axis=1).to(tl.float64)
        s = tl.where(mask, g + (j - (bins - 1)).to(ACC), 0.0)
        y_low_sum += tl.sum(by_g * s, axis=1).to(tl.float64)
        s = tl.where(mask, g + j.to(ACC), 0.0)
        y_high_sum += tl.sum(by_g * s, axis=1).to(tl.float64)
    place_ptrs = partials_ptr + row * tl.num_programs(1) + tl.program_id(1)
    stride = tl.num_programs(1) * n_rows.to(tl.int64)
    tl.store(place_ptrs, x_low_sum, mask=used)
    tl.store(place_ptrs + stride, x_high_sum, mask=used)
    tl.store(place_ptrs + 2 * stride, y_low_sum, mask=used)
    tl.store(place_ptrs + 3 * stride, y_high_sum, mask=used)


def _mask_of(x: Tensor, present: Tensor | None) -> Tensor:
    """Bytes of the mask; without one, anything that is not read."""
    return x if present is None else present.view(torch.uint8)


def soft_histogram(
    x: Tensor,
    y: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    bins: int,
    present: Tensor | None = None,
) -> Tensor:
    """See `mmfuse.reference.soft_histogram`."""
    n_rows, n_cols = x.shape
    # float64, because rounding by rounding a large float32 count would lose small shares.
    table = torch.zeros((n_rows, bins, bins), dtype=torch.float64, device=x.device)
    broken = torch.zeros(n_rows, dtype=torch.uint8, device=x.device)
    if x.numel():
        split = split_problems(n_rows, n_cols)
        with launch_on(x.device):
            _soft_histogram_kernel[split.grid](
                table,
                broken,
                x,
                y,
                x_range,
                y_range,
                _mask_of(x, present),
                n_rows,
                n_cols,
                split.cols_per_program,
                bins,
                MASKED=present is not None,
                **split.constants(),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    counts = table.to(accumulator(x))
    return counts.masked_fill_(broken.view(torch.bool)[:, None, None], torch.nan)


def soft_histogram_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    bins: int,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y and of both ends of their ranges; 0 where a sample is not present."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_y = torch.empty_like(y, memory_format=torch.contiguous_format)
    if not x.numel():
        return grad_x, grad_y, torch.zeros_like(x_range), torch.zeros_like(y_range)
    n_rows, n_cols = x.shape
    split = split_problems(n_rows, n_cols)
    partials = torch.empty((4, n_rows, split.splits), dtype=torch.float64, device=x.device)
    with launch_on(x.device):
        _soft_histogram_backward_kernel[split.grid](
            grad_x,
            grad_y,
            partials,
            grad,
            x,
            y,
            x_range,
            y_range,
            _mask_of(x, present),
            n_rows,
            n_cols,
            split.cols_per_program,
            bins,
            MASKED=present is not None,
            **split.constants(),
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    x_low, x_high, y_low, y_high = partials.sum(-1)
    grad_x_range = _range_grad(x_low, x_high, x_range)
    return grad_x, grad_y, grad_x_range, _range_grad(y_low, y_high, y_range)


def _range_grad(low: Tensor, high: Tensor, range_: Tensor) -> Tensor:
    width = (range_[:, 1] - range_[:, 0]).unsqueeze(1)
    return (torch.stack([low, -high], dim=1) / width).to(range_.dtype)
