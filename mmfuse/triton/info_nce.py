"""InfoNCE: tiles of similarities by PyTorch's matrix product, with one launch for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import divide, round_to, widen
from ._partials import accumulator
from ._tensor_list import launch_on

# Rows and columns of a tile of similarities: 16 MiB in float32.
TILE_SIDE = 2048
NUM_WARPS = 8
# A program reduces a few lines, rows or columns, by blocks of these sizes.
ROW_LINES = 8
ROW_ITEMS = 128
COLUMN_LINES = 16
COLUMN_ITEMS = 32
# Slopes are at most 1. In float16 small ones would lose bits below 2^-14, large ones end at 2^16.
HALF_SCALE = {torch.float16: 2.0**15, torch.bfloat16: 1.0}


@triton.jit
def _finite_or_zero(x):
    """The number to subtract from exponents: an infinity minus itself would be NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _merge_lines(
    dots_ptr,
    temperature,
    tops_ptr,
    totals_ptr,
    first_line,
    n_lines,
    line_stride,
    n_items,
    item_stride,
    LINES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Merges a few lines of a tile into their maxima and their sums of exp(s - maximum)."""
    line = first_line + tl.arange(0, LINES)
    used = line < n_lines
    line_ptrs = dots_ptr + (line * line_stride)[:, None]
    top = tl.load(tops_ptr + line, mask=used, other=float("-inf"))
    total = tl.load(totals_ptr + line, mask=used, other=0.0)
    for start in range(0, n_items, ITEMS):
        item = start + tl.arange(0, ITEMS)
        mask = used[:, None] & (item < n_items)[None, :]
        dots = tl.load(line_ptrs + (item * item_stride)[None, :], mask=mask, other=0.0)
        s = tl.where(mask, divide(dots, temperature), float("-inf"))
        # A NaN reaches the sum, not the maximum, where backends differ.
        new_top = tl.maximum(top, tl.max(tl.where(s == s, s, float("-inf")), axis=1))
        shift = _finite_or_zero(new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), axis=1)
        top = new_top
    tl.store(tops_ptr + line, top, mask=used)
    tl.store(totals_ptr + line, total, mask=used)


@triton.jit(
    do_not_specialize=[
        "temperature_ptr", "row_tops_ptr", "row_totals_ptr", "column_tops_ptr",
        "column_totals_ptr", "n_rows",
    ]
)  # fmt: skip
def _merge_tile_kernel(
    dots_ptr,
    temperature_ptr,
    row_tops_ptr,
    row_totals_ptr,
    column_tops_ptr,
    column_totals_ptr,
    n_rows,
    n_columns,
    ROW_LINES: tl.constexpr,
    ROW_ITEMS: tl.constexpr,
    COLUMN_LINES: tl.constexpr,
    COLUMN_ITEMS: tl.constexpr,
):
    """Updates the log-sum-exp of a tile's rows and of its columns; programs do one or the other."""
    temperature = tl.load(temperature_ptr)
    program = tl.program_id(0)
    row_programs = tl.cdiv(n_rows, ROW_LINES)
    if program < row_programs:
        _merge_lines(
            dots_ptr, temperature, row_tops_ptr, row_totals_ptr,
            program * ROW_LINES, n_rows, n_columns, n_columns, 1, ROW_LINES, ROW_ITEMS,
        )  # fmt: skip
    else:
        _merge_lines(
            dots_ptr, temperature, column_tops_ptr, column_totals_ptr,
            (program - row_programs) * COLUMN_LINES, n_columns, 1, n_rows, n_columns,
            COLUMN_LINES, COLUMN_ITEMS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "partials_ptr", "grad_ptr", "temperature_ptr", "rows_ptr", "columns_ptr", "batch",
        "diagonal", "n_rows",
    ]
)  # fmt: skip
def _slope_kernel(
    slopes_ptr,
    dots_ptr,
    partials_ptr,
    grad_ptr,
    temperature_ptr,
    rows_ptr,
    columns_ptr,
    batch,
    diagonal,
    n_rows,
    n_columns,
    HALF_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Turns similarities into slopes; writes the sum of slope times similarity.

    The pairs are where the row, counted from the tile's first, is the column plus `diagonal`. With
    HALF_SCALE the slopes have that in place of grad/batch, and are sums of two numbers in half
    precision, [2, n_rows, n_columns], of which the second is what rounding left of the first.
    """
    ACC: tl.constexpr = dots_ptr.dtype.element_ty
    OUT: tl.constexpr = slopes_ptr.dtype.element_ty
    temperature = tl.load(temperature_ptr)
    scale = divide(tl.load(grad_ptr), batch.to(ACC))
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_sums = tl.load(rows_ptr + row, mask=row < n_rows, other=0.0)[:, None]
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for start in range(0, n_columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        used = column < n_columns
        mask = (row < n_rows)[:, None] & used[None, :]
        at = (row * n_columns)[:, None] + column[None, :]
        s = divide(tl.load(dots_ptr + at, mask=mask, other=0.0), temperature)
        column_sums = tl.load(columns_ptr + column, mask=used, other=0.0)[None, :]
        softmaxes = tl.exp(s - row_sums) + tl.exp(s - column_sums)
        paired = tl.where(row[:, None] == column[None, :] + diagonal, 1.0, 0.0)
        slope = ((paired - 0.5 * softmaxes) * scale).to(ACC)
        if HALF_SCALE == 0:
            tl.store(slopes_ptr + at, slope, mask=mask)
        else:
            scaled = (paired - 0.5 * softmaxes).to(ACC) * HALF_SCALE
            first = round_to(scaled, OUT)
            rest = round_to(scaled - widen(first, ACC), OUT)
            tl.store(slopes_ptr + at, first, mask=mask)
            tl.store(slopes_ptr + n_rows * n_columns + at, rest, mask=mask)
        total += tl.sum(tl.where(mask, slope * s, 0.0), axis=1).to(tl.float64)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, axis=0))


def _spans(count: int) -> Iterator[slice]:
    for first in range(0, count, TILE_SIDE):
        yield slice(first, min(first + TILE_SIDE, count))


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Writes x @ y to out, in whose dtype the products of halves are exact."""
    if x.dtype == out.dtype:
        return torch.mm(x, y, out=out)
    # On tensor cores, and only there does PyTorch have such a product.
    if x.is_cuda and x.numel() and y.numel():
        return torch.mm(x, y, out.dtype, out=out)
    return torch.mm(x.to(out.dtype), y.to(out.dtype), out=out)


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yields each tile of a @ b.T with its rows and columns; the next one overwrites it."""
    count = a.shape[0]
    buffer = torch.empty(min(count, TILE_SIDE) ** 2, dtype=accumulator(a), device=a.device)
    for rows in _spans(count):
        for columns in _spans(count):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            tile = buffer[: shape[0] * shape[1]].view(shape)
            yield _multiply(a[rows], b[columns].T, tile), rows, columns


def info_nce(a: Tensor, b: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.info_nce`; also log-sum-exp of the rows and of the columns."""
    count, dtype = a.shape[0], accumulator(a)
    # One row for the rows, one for the columns.
    tops = torch.full((2, count), -math.inf, dtype=dtype, device=a.device)
    totals = torch.zeros_like(tops)
    diagonal = torch.empty(count, dtype=dtype, device=a.device)
    with launch_on(a.device):
        for tile, rows, columns in _tiles(a, b):
            if rows == columns:
                torch.div(tile.diagonal(), temperature, out=diagonal[rows])
            n_rows, n_columns = tile.shape
            programs = triton.cdiv(n_rows, ROW_LINES) + triton.cdiv(n_columns, COLUMN_LINES)
            _merge_tile_kernel[(programs,)](
                tile,
                temperature,
                tops[0, rows],
                totals[0, rows],
                tops[1, columns],
                totals[1, columns],
                n_rows,
                n_columns,
                **_BLOCKS,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    sums = torch.where(tops.isinf(), 0.0, tops) + totals.log()
    row_sums, column_sums = sums.unbind()
    bound = (diagonal - (row_sums + column_sums) / 2).mean() + math.log(count)
    return bound, row_sums.clone(), column_sums.clone()


def info_nce_backward(
    grad: Tensor, a: Tensor, b: Tensor, temperature: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the temperature."""
    count, dtype = a.shape[0], accumulator(a)
    half_scale = HALF_SCALE.get(a.dtype, 0.0)
    side = min(count, TILE_SIDE)
    halves = torch.empty(2 * side**2 if half_scale else 0, dtype=a.dtype, device=a.device)
    product = torch.empty(side * a.shape[1] if half_scale else 0, dtype=dtype, device=a.device)
    grad_a = torch.zeros(a.shape, dtype=dtype, device=a.device)
    grad_b = torch.zeros_like(grad_a)
    n_tiles = triton.cdiv(count, TILE_SIDE) ** 2
    programs = triton.cdiv(min(count, TILE_SIDE), ROW_LINES)
    partials = torch.zeros((n_tiles, programs), dtype=torch.float64, device=a.device)
    with launch_on(a.device):
        for k, (tile, own, others) in enumerate(_tiles(a, b)):
            n_rows, n_columns = tile.shape
            slopes = tile.unsqueeze(0)
            if half_scale:
                slopes = halves[: 2 * tile.numel()].view(2, n_rows, n_columns)
            _slope_kernel[(triton.cdiv(n_rows, ROW_LINES),)](
                slopes,
                tile,
                partials[k],
                grad,
                temperature,
                rows[own],
                columns[others],
                count,
                others.start - own.start,
                n_rows,
                n_columns,
                HALF_SCALE=half_scale,
                BLOCK_ROWS=ROW_LINES,
                BLOCK_COLUMNS=ROW_ITEMS,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
            for part in slopes.unbind():
                _add_product(part, b[others], grad_a[own], product)
                _add_product(part.T, a[own], grad_b[others], product)
    if half_scale:
        weight = grad / (count * half_scale)
        grad_a.mul_(weight)
        grad_b.mul_(weight)
    grad_temperature = -partials.sum().to(dtype) / temperature
    grad_a.div_(temperature)
    grad_b.div_(temperature)
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_temperature


def _add_product(x: Tensor, y: Tensor, sums: Tensor, buffer: Tensor) -> None:
    """Adds x @ y; of halves by way of the buffer, since PyTorch's product does not add them."""
    if x.dtype == sums.dtype:
        sums.addmm_(x, y)
    else:
        sums.add_(_multiply(x, y, buffer[: sums.numel()].view_as(sums)))


_BLOCKS = {
    "ROW_LINES": ROW_LINES,
    "ROW_ITEMS": ROW_ITEMS,
    "COLUMN_LINES": COLUMN_LINES,
    "COLUMN_ITEMS": COLUMN_ITEMS,
}
