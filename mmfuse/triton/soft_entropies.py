"""Entropies of a soft histogram in one launch after it, and the histogram's gradient in one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import divide
from ._tensor_list import launch_on
from .soft_histogram import soft_histogram, soft_histogram_backward

# A program has one problem's table and reads it in tiles of so many cells.
TILE_CELLS = 2048
NUM_WARPS = 4


@triton.jit
def _share_and_log(counts, samples, least):
    """A share of the samples, and the logarithm of what is at least the smallest normal number."""
    p = divide(counts, samples)
    return p, tl.log(tl.maximum(p, least, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _terms(counts, samples, least):
    """The terms -p log p in float64; 0 for an empty cell, also beside the table."""
    p, log_p = _share_and_log(counts, samples, least)
    # Written so that NaN stays NaN.
    return tl.where(p == 0, 0.0, -p * log_p).to(tl.float64)


@triton.jit
def _slopes(counts, samples, least, scale):
    """The slopes of -p log max(p, least) by the counts."""
    p, log_p = _share_and_log(counts, samples, least)
    return -scale * (log_p + tl.where(p < least, 0.0, 1.0).to(p.dtype))


@triton.jit
def _column_sums(table, bins, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, bins, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < bins) & (column < bins)
        counts = tl.load(table + row * bins + column, mask=mask, other=0.0)
        sums += tl.sum(counts.to(tl.float64), axis=0)
    return sums


@triton.jit
def _samples_of(counts_ptr, samples, problem, ACC: tl.constexpr, MASKED: tl.constexpr):
    """How many samples of the problem count."""
    return tl.load(counts_ptr + problem).to(ACC) if MASKED else samples.to(ACC)


@triton.jit(do_not_specialize=["out_ptr", "weights_ptr", "counts_ptr", "samples", "bins"])
def _entropies_kernel(
    out_ptr,
    weights_ptr,
    counts_ptr,
    samples: tl.int64,
    bins,
    MASKED: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes H(x), H(y) and H(x, y) of one problem."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    table = weights_ptr + problem * bins * bins
    total = _samples_of(counts_ptr, samples, problem, ACC, MASKED)
    least = tl.full([1], LEAST, ACC)
    column = tl.arange(0, COLUMNS)[None, :]
    h_x = tl.zeros([ROWS], tl.float64)
    h_xy = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, bins, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < bins) & (column < bins)
        counts = tl.load(table + row * bins + column, mask=mask, other=0.0)
        h_xy += tl.sum(_terms(counts, total, least), axis=0)
        h_x += _terms(tl.sum(counts.to(tl.float64), axis=1).to(ACC), total, least)
    sums = _column_sums(table, bins, ROWS, COLUMNS)
    h_y = _terms(sums.to(ACC), total, least)
    out = out_ptr + 3 * problem
    tl.store(out, tl.sum(h_x, axis=0).to(ACC))
    tl.store(out + 1, tl.sum(h_y, axis=0).to(ACC))
    tl.store(out + 2, tl.sum(h_xy, axis=0).to(ACC))


@triton.jit(
    do_not_specialize=["slopes_ptr", "grad_ptr", "weights_ptr", "counts_ptr", "samples", "bins"]
)
def _slopes_kernel(
    slopes_ptr,
    grad_ptr,
    weights_ptr,
    counts_ptr,
    samples: tl.int64,
    bins,
    MASKED: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the gradient of one problem's table from those of its entropies."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    table = weights_ptr + problem * bins * bins
    total = _samples_of(counts_ptr, samples, problem, ACC, MASKED)
    least = tl.full([1], LEAST, ACC)
    by_x = tl.load(grad_ptr + 3 * problem) / total
    by_y = tl.load(grad_ptr + 3 * problem + 1) / total
    by_both = tl.load(grad_ptr + 3 * problem + 2) / total
    column = tl.arange(0, COLUMNS)[None, :]
    sums = _column_sums(table, bins, ROWS, COLUMNS)
    of_columns = _slopes(sums.to(ACC), total, least, by_y)
    for start in range(0, bins, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < bins) & (column < bins)
        counts = tl.load(table + row * bins + column, mask=mask, other=0.0)
        of_rows = _slopes(tl.sum(counts.to(tl.float64), axis=1).to(ACC), total, least, by_x)
        slopes = _slopes(counts, total, least, by_both)
        slopes += of_rows[:, None] + of_columns[None, :]
        target = slopes_ptr + problem * bins * bins + row * bins + column
        tl.store(target, slopes, mask=mask)


def _constants(weights: Tensor) -> dict[str, int | float]:
    columns = triton.next_power_of_2(weights.shape[1])
    rows = min(triton.next_power_of_2(weights.shape[1]), max(TILE_CELLS // columns, 1))
    return {"LEAST": torch.finfo(weights.dtype).tiny, "ROWS": rows, "COLUMNS": columns}


def soft_entropies(
    x: Tensor, y: Tensor, bins: int, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.reference.soft_entropies`."""
    x_range, y_range = _range_of(x, present), _range_of(y, present)
    weights = soft_histogram(x, y, x_range, y_range, bins, present)
    entropies = torch.empty((x.shape[0], 3), dtype=x.dtype, device=x.device)
    if x.shape[0]:
        with launch_on(x.device):
            _entropies_kernel[(x.shape[0],)](
                entropies,
                weights,
                weights if present is None else present.sum(1),
                x.shape[1],
                bins,
                MASKED=present is not None,
                **_constants(weights),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return entropies, weights, x_range, y_range


def soft_entropies_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y; those of the ranges' ends are shared by the values that are there."""
    slopes = torch.empty_like(weights)
    if x.shape[0]:
        with launch_on(x.device):
            _slopes_kernel[(x.shape[0],)](
                slopes,
                grad,
                weights,
                weights if present is None else present.sum(1),
                x.shape[1],
                weights.shape[1],
                MASKED=present is not None,
                **_constants(weights),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    grad_x, grad_y, grad_x_range, grad_y_range = soft_histogram_backward(
        slopes, x, y, x_range, y_range, weights.shape[1], present
    )
    _add_to_ends(grad_x, x, x_range, grad_x_range, present)
    _add_to_ends(grad_y, y, y_range, grad_y_range, present)
    return grad_x, grad_y


def _range_of(x: Tensor, present: Tensor | None) -> Tensor:
    """[P, 2]; constant rows are at the first of the bins' centres."""
    if present is None:
        low, high = torch.aminmax(x, dim=1)
    else:
        low = torch.where(present, x, torch.inf).amin(1)
        high = torch.where(present, x, -torch.inf).amax(1)
        low, high = (torch.where(present.any(1), end, torch.nan) for end in (low, high))
    least = (low.abs() * (4 * torch.finfo(x.dtype).eps)).clamp(min=0.5)
    return torch.stack([low, high + torch.where(low == high, 2 * least, 0.0)], dim=1)


def _add_to_ends(
    grad: Tensor, x: Tensor, range_: Tensor, of_range: Tensor, present: Tensor | None
) -> None:
    lowest, highest = x == range_[:, :1], x == range_[:, 1:]
    if present is not None:
        lowest, highest = lowest & present, highest & present
    n_low, n_high = lowest.sum(1, keepdim=True), highest.sum(1, keepdim=True)
    to_low, to_high = of_range[:, :1], of_range[:, 1:]
    # The upper end of a constant row is above all values, and moves with them.
    to_low = torch.where(n_high == 0, to_low + to_high, to_low)
    grad += torch.where(lowest, to_low / n_low.clamp(min=1), 0.0)
    grad += torch.where(highest, to_high / n_high.clamp(min=1), 0.0)
