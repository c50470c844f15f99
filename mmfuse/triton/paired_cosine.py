"""Mean cosine of row pairs: two launches forward, one backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.paired_cosine import MIN_NORM
from ._aot import COMPILE_OPTIONS
from ._device import divide, round_to, widen
from ._partials import accumulator, mean
from ._tensor_list import launch_on

_MIN_NORM = tl.constexpr(MIN_NORM)

TILE_BYTES = 8192
MAX_BLOCK_COLS = 1024
NUM_WARPS = 8
MAX_PROGRAMS = 2048


class RowSplit(NamedTuple):
    """How the rows of [B, D] are divided among programs.

    Attributes:
        block_rows: Rows of a tile.
        block_cols: Columns of a tile.
        rows_per_program: A multiple of `block_rows`.
        programs: How many programs; 0 for no rows.
    """

    block_rows: int
    block_cols: int
    rows_per_program: int
    programs: int


def blocks_for(n_cols: int, wide: bool) -> tuple[int, int]:
    """Rows and columns of a tile, which is held in registers as float32, or float64 if wide."""
    cols = min(max(triton.next_power_of_2(n_cols), 16), MAX_BLOCK_COLS)
    return TILE_BYTES // (8 if wide else 4) // cols, cols


def split_rows(x: Tensor) -> RowSplit:
    """Divides the rows of x among at most MAX_PROGRAMS programs."""
    n_rows, n_cols = x.shape
    block_rows, block_cols = blocks_for(n_cols, x.dtype == torch.float64)
    tiles = triton.cdiv(n_rows, block_rows)
    rows_per_program = max(triton.cdiv(tiles, MAX_PROGRAMS), 1) * block_rows
    return RowSplit(block_rows, block_cols, rows_per_program, triton.cdiv(n_rows, rows_per_program))


@triton.jit
def _load_tile(row_ptrs, used, start, n_cols, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Columns start ... of the rows in use, 0 beyond them."""
    c = start + tl.arange(0, BLOCK_COLS)
    mask = used[:, None] & (c < n_cols)[None, :]
    return widen(tl.load(row_ptrs[:, None] + c[None, :], mask=mask, other=0.0), ACC)


@triton.jit
def _norm(square):
    # The fast root of float32 is not the nearest number, and the least norm is compared exactly.
    return tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)


@triton.jit
def _at_least(norm):
    """The norm to divide by; a NaN stays."""
    return tl.where(norm < _MIN_NORM, _MIN_NORM, norm)


@triton.jit
def _norms_and_cosine(a_ptrs, b_ptrs, used, n_cols, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Norm of each row of a and of b, and their cosine, in one pass."""
    aa = tl.zeros(used.shape, ACC)
    bb = tl.zeros(used.shape, ACC)
    ab = tl.zeros(used.shape, ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        a = _load_tile(a_ptrs, used, start, n_cols, ACC, BLOCK_COLS)
        b = _load_tile(b_ptrs, used, start, n_cols, ACC, BLOCK_COLS)
        aa += tl.sum(a * a, axis=1)
        bb += tl.sum(b * b, axis=1)
        ab += tl.sum(a * b, axis=1)
    norm_a = _norm(aa)
    norm_b = _norm(bb)
    # As for the root: rows that are equal and exact have cosine 1, not a number near it.
    return norm_a, norm_b, divide(ab, _at_least(norm_a) * _at_least(norm_b))


@triton.jit(do_not_specialize=["partials_ptr", "n_rows", "rows_per_program"])
def _paired_cosine_kernel(
    a_ptr,
    b_ptr,
    partials_ptr,
    n_rows,
    n_cols,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes the sum of the cosines of rows_per_program rows."""
    ACC: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    first_row = program * rows_per_program
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for start in range(0, rows_per_program, BLOCK_ROWS):
        row = first_row + start + tl.arange(0, BLOCK_ROWS)
        used = row < n_rows
        begin = row * n_cols
        _, _, cosine = _norms_and_cosine(
            a_ptr + begin, b_ptr + begin, used, n_cols, ACC, BLOCK_COLS
        )
        total += tl.where(used, cosine, 0.0).to(tl.float64)
    tl.store(partials_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["grad_ptr", "n_rows"])
def _paired_cosine_backward_kernel(
    grad_a_ptr,
    grad_b_ptr,
    grad_ptr,
    a_ptr,
    b_ptr,
    n_rows,
    n_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes grad / B (other - cosine unit) / norm for a tile of rows, 0 for a zero row."""
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    used = row < n_rows
    begin = row * n_cols
    norm_a, norm_b, cosine = _norms_and_cosine(
        a_ptr + begin, b_ptr + begin, used, n_cols, ACC, BLOCK_COLS
    )
    scale = tl.load(grad_ptr).to(ACC) / n_rows.to(ACC)
    inverse_a = (1.0 / _at_least(norm_a))[:, None]
    inverse_b = (1.0 / _at_least(norm_b))[:, None]
    zero_a = (norm_a <= _MIN_NORM)[:, None]
    zero_b = (norm_b <= _MIN_NORM)[:, None]
    cosine = cosine[:, None]
    for start in range(0, n_cols, BLOCK_COLS):
        unit_a = _load_tile(a_ptr + begin, used, start, n_cols, ACC, BLOCK_COLS) * inverse_a
        unit_b = _load_tile(b_ptr + begin, used, start, n_cols, ACC, BLOCK_COLS) * inverse_b
        slope_a = scale * (unit_b - cosine * unit_a) * inverse_a
        slope_b = scale * (unit_a - cosine * unit_b) * inverse_b
        c = start + tl.arange(0, BLOCK_COLS)
        mask = used[:, None] & (c < n_cols)[None, :]
        offsets = begin[:, None] + c[None, :]
        grad_a = round_to(tl.where(zero_a, 0.0, slope_a), DTYPE)
        grad_b = round_to(tl.where(zero_b, 0.0, slope_b), DTYPE)
        tl.store(grad_a_ptr + offsets, grad_a, mask=mask)
        tl.store(grad_b_ptr + offsets, grad_b, mask=mask)


def sum_cosines(a: Tensor, b: Tensor, split: RowSplit, partials: Tensor) -> None:
    """Writes each program's sum of cosines to partials, float64 [split.programs]: one launch."""
    if not split.programs:
        return
    with launch_on(a.device):
        _paired_cosine_kernel[(split.programs,)](
            a,
            b,
            partials,
            a.shape[0],
            a.shape[1],
            split.rows_per_program,
            BLOCK_ROWS=split.block_rows,
            BLOCK_COLS=split.block_cols,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )


def paired_cosine(a: Tensor, b: Tensor) -> Tensor:
    """See `mmfuse.ops.paired_cosine`."""
    split = split_rows(a)
    partials = torch.empty(split.programs, dtype=torch.float64, device=a.device)
    sum_cosines(a, b, split, partials)
    return mean(partials, a.shape[0], accumulator(a))


def paired_cosine_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cosine in a and in b; 0 for a zero row."""
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format)
    grad_b = torch.empty_like(b, memory_format=torch.contiguous_format)
    n_rows, n_cols = a.shape
    if a.numel():
        block_rows, block_cols = blocks_for(n_cols, a.dtype == torch.float64)
        with launch_on(a.device):
            _paired_cosine_backward_kernel[(triton.cdiv(n_rows, block_rows),)](
                grad_a,
                grad_b,
                grad,
                a,
                b,
                n_rows,
                n_cols,
                BLOCK_ROWS=block_rows,
                BLOCK_COLS=block_cols,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return grad_a, grad_b
