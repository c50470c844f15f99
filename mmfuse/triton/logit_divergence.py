"""Divergences of pairs of logits: one launch for a small batch, two for a large one; backward one.

The formulas are those of mmfuse/reference/logit_divergence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.logit_divergence import JS as _JS_PLACE
from ..reference.logit_divergence import KL as _KL_PLACE
from ..reference.logit_divergence import MIXTURE as _MIXTURE_PLACE
from ..reference.logit_divergence import ROW_NUMBERS
from ._aot import COMPILE_OPTIONS
from ._device import round_to, widen
from ._score_call import NUM_WARPS, blocks_for
from ._score_rows import max_and_sum, shared
from ._tensor_list import launch_on

KL = tl.constexpr(_KL_PLACE)
MIXTURE = tl.constexpr(_MIXTURE_PLACE)
JS = tl.constexpr(_JS_PLACE)
_NUMBERS = tl.constexpr(ROW_NUMBERS)
_LOG_2 = tl.constexpr(0.6931471805599453)

# Up to so many tiles of rows, one program takes them all and needs no second launch.
TILES_IN_ONE_LAUNCH = 8
MAX_SPLITS = 256
MERGE_WARPS = 4


@triton.jit
def _log_of_one_more(x):
    """Ln(1 + x) for 0 <= x < 1."""
    u = 1.0 + x
    # x - (u - 1) is the part of x that 1 + x has rounded away.
    return tl.log(u) + (x - (u - 1.0))


@triton.jit
def _log_ratio(d):
    """From d = ln p - ln q: |d|, exp(-|d|), ln cosh(d / 2), ln(max(p, q) / m), and |d| < 1."""
    size = tl.abs(d)
    e = tl.exp(-size)
    near = size < 1.0
    sinh_sq = (1.0 - e) * (1.0 - e) / (4.0 * e)
    r = _log_of_one_more(tl.where(near, sinh_sq, e))
    x = size * 0.5
    log_cosh = tl.where(near, r * 0.5, x - (_LOG_2 - r))
    nearer = tl.where(near, x - log_cosh, _LOG_2 - r)
    return size, e, log_cosh, nearer, near


@triton.jit
def _halves(d):
    """Half of ln(p / m), and of ln(q / m)."""
    size, _, _, nearer, _ = _log_ratio(d)
    farther = nearer - size
    above = d >= 0.0
    return tl.where(above, nearer, farther) * 0.5, tl.where(above, farther, nearer) * 0.5


@triton.jit
def _kl_terms(p, q, d, TERMS: tl.constexpr):
    """Terms p (d - 1 + exp(-d)), the series where that is a difference of larger numbers."""
    series = tl.full(d.shape, 1.0, d.dtype)
    for i in tl.static_range(TERMS - 2):
        series = 1.0 - series * d / (TERMS - i)
    near = p * (d * d * 0.5 * series)
    return tl.where(tl.abs(d) < 1.0, near, shared(p, d) - p + q)


@triton.jit
def _js_terms(p, q, d):
    size, e, log_cosh, nearer, near = _log_ratio(d)
    close = size * 0.5 * ((1.0 - e) / (1.0 + e)) - log_cosh
    far = nearer - shared(e, size) / (1.0 + e)
    return shared((p + q) * 0.5, tl.where(near, close, far))


@triton.jit
def _softmax_tile(
    a_ptrs, b_ptrs, used, c, n_classes, top_a, top_b, log_a, log_b, ACC: tl.constexpr
):  # fmt: skip
    """A tile's p, q and ln p - ln q; p and q are 0 beyond the classes and rows."""
    inside = used[:, None] & (c < n_classes)[None, :]
    # Another name than the loaded numbers: a variable keeps its type.
    x = widen(tl.load(a_ptrs[:, None] + c[None, :], mask=inside, other=0.0), ACC)
    y = widen(tl.load(b_ptrs[:, None] + c[None, :], mask=inside, other=0.0), ACC)
    x = x - top_a[:, None]
    y = y - top_b[:, None]
    p = tl.where(inside, tl.exp(x - log_a[:, None]), 0.0)
    q = tl.where(inside, tl.exp(y - log_b[:, None]), 0.0)
    return inside, p, q, (x - y) - (log_a - log_b)[:, None]


@triton.jit
def _softmax(row_ptrs, used, n_classes, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr):
    """Maximum and log-sum of each row."""
    top, total = max_and_sum(row_ptrs, used, n_classes, 1, False, ACC, BLOCK_CLASSES)
    return top, tl.log(total)


@triton.jit
def _pair_rows(
    first_ptr, second_ptr, n_classes, first_stride, second_stride, KIND: tl.constexpr,
    PER_ROW: tl.constexpr, value_ptr, sum_ptr, numbers_ptr, n_rows, first_tile, end_tile,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes each row's numbers, and its divergence, their mean, or with sum_ptr their sum."""
    ACC: tl.constexpr = tl.float64 if first_ptr.dtype.element_ty == tl.float64 else tl.float32
    TERMS: tl.constexpr = 18 if ACC == tl.float64 else 11
    out = numbers_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for tile in range(first_tile, end_tile):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        used = row < n_rows
        a_ptrs = first_ptr + row * first_stride
        b_ptrs = second_ptr + row * second_stride
        top_a, log_a = _softmax(a_ptrs, used, n_classes, ACC, BLOCK_CLASSES)
        top_b, log_b = _softmax(b_ptrs, used, n_classes, ACC, BLOCK_CLASSES)
        value = tl.zeros([BLOCK_ROWS], ACC)
        under_p = tl.zeros([BLOCK_ROWS], ACC)
        under_q = tl.zeros([BLOCK_ROWS], ACC)
        for start in range(0, n_classes, BLOCK_CLASSES):
            c = start + tl.arange(0, BLOCK_CLASSES)
            _inside, p, q, d = _softmax_tile(
                a_ptrs, b_ptrs, used, c, n_classes, top_a, top_b, log_a, log_b, ACC
            )
            if KIND == KL:
                value += tl.sum(_kl_terms(p, q, d, TERMS), axis=1)
            elif KIND == MIXTURE:
                _size, _e, log_cosh, _nearer, _near = _log_ratio(d)
                under_p += tl.sum(shared(p, log_cosh), axis=1)
                under_q += tl.sum(shared(q, log_cosh), axis=1)
            else:
                u, v = _halves(d)
                value += tl.sum(_js_terms(p, q, d), axis=1)
                under_p += tl.sum(shared(p, u), axis=1)
                under_q += tl.sum(shared(q, v), axis=1)
        if KIND == KL:
            under_p = value
        if KIND == MIXTURE:
            value = (under_p + under_q) * 0.5
        tl.store(numbers_ptr + row, top_a.to(out), mask=used)
        tl.store(numbers_ptr + n_rows + row, top_b.to(out), mask=used)
        tl.store(numbers_ptr + 2 * n_rows + row, log_a.to(out), mask=used)
        tl.store(numbers_ptr + 3 * n_rows + row, log_b.to(out), mask=used)
        tl.store(numbers_ptr + 4 * n_rows + row, under_p.to(out), mask=used)
        tl.store(numbers_ptr + 5 * n_rows + row, under_q.to(out), mask=used)
        if PER_ROW:
            tl.store(value_ptr + row, value.to(out), mask=used)
        total += tl.where(used, value, 0.0).to(tl.float64)
    if not PER_ROW:
        if sum_ptr is None:
            tl.store(value_ptr, (tl.sum(total, axis=0) / n_rows).to(out))
        else:
            tl.store(sum_ptr, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=[
        "class_counts", "first_strides", "second_strides", "value_ptr", "sum_ptr", "numbers_ptr",
        "n_rows", "n_tiles", "tiles_per_program",
    ]
)  # fmt: skip
def _logit_divergence_kernel(
    first_ptrs, second_ptrs, class_counts, first_strides, second_strides, value_ptr, sum_ptr,
    numbers_ptr, n_rows, n_tiles, tiles_per_program, KIND: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Rows of one pair; grid (splits, K)."""
    k = tl.program_id(1)
    first_tile = tl.program_id(0).to(tl.int64) * tiles_per_program
    end_tile = tl.minimum(first_tile + tiles_per_program, n_tiles)
    place = k * tl.num_programs(0) + tl.program_id(0)
    n_rows = n_rows.to(tl.int64)  # six of them are more than an int32 holds
    of_pair = k * n_rows
    # Each pair has a pointer type of its own, hence the branches.
    for m in tl.static_range(len(first_ptrs)):
        if k == m:
            _pair_rows(
                first_ptrs[m], second_ptrs[m], class_counts[m], first_strides[m],
                second_strides[m], KIND, PER_ROW, value_ptr + (of_pair if PER_ROW else k),
                None if sum_ptr is None else sum_ptr + place, numbers_ptr + of_pair * _NUMBERS,
                n_rows, first_tile, end_tile, BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["sums_ptr", "value_ptr", "n_rows", "n_splits"])
def _logit_divergence_merge_kernel(
    sums_ptr, value_ptr, n_rows, n_splits, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """The mean of one pair from float64 sums [K, splits]."""
    lane = tl.arange(0, BLOCK_SIZE)
    place = sums_ptr + tl.program_id(0) * n_splits + lane
    total = tl.sum(tl.load(place, mask=lane < n_splits, other=0.0), axis=0)
    tl.store(value_ptr + tl.program_id(0), (total / n_rows).to(value_ptr.dtype.element_ty))


@triton.jit
def _slopes(p, q, d, under_p, under_q, KIND: tl.constexpr):
    """Derivatives of the divergence by both logits."""
    if KIND == KL:
        to_a = shared(p, d - under_p)
        to_b = q - p
    elif KIND == MIXTURE:
        _, _, log_cosh, _, _ = _log_ratio(d)
        quarter = (p - q) * 0.25
        to_a = shared(p, log_cosh - under_p) * 0.5 + quarter
        to_b = shared(q, log_cosh - under_q) * 0.5 - quarter
    else:
        u, v = _halves(d)
        to_a = shared(p, u - under_p)
        to_b = shared(q, v - under_q)
    return to_a, to_b


@triton.jit
def _backward_rows(
    grad_first_ptr, grad_second_ptr, first_ptr, second_ptr, n_classes, first_stride,
    second_stride, KIND: tl.constexpr, PER_ROW: tl.constexpr, grad_ptr, numbers_ptr, n_rows,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = first_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    used = row < n_rows
    top_a = tl.load(numbers_ptr + row, mask=used, other=0.0).to(ACC)
    top_b = tl.load(numbers_ptr + n_rows + row, mask=used, other=0.0).to(ACC)
    log_a = tl.load(numbers_ptr + 2 * n_rows + row, mask=used, other=0.0).to(ACC)
    log_b = tl.load(numbers_ptr + 3 * n_rows + row, mask=used, other=0.0).to(ACC)
    under_p = tl.load(numbers_ptr + 4 * n_rows + row, mask=used, other=0.0).to(ACC)
    under_q = tl.load(numbers_ptr + 5 * n_rows + row, mask=used, other=0.0).to(ACC)
    if PER_ROW:
        weight = tl.load(grad_ptr + row, mask=used, other=0.0).to(ACC)
    else:
        weight = tl.full([BLOCK_ROWS], 1.0, ACC) * (tl.load(grad_ptr).to(ACC) / n_rows)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        inside, p, q, d = _softmax_tile(
            first_ptr + row * first_stride, second_ptr + row * second_stride, used, c, n_classes,
            top_a, top_b, log_a, log_b, ACC,
        )  # fmt: skip
        to_a, to_b = _slopes(p, q, d, under_p[:, None], under_q[:, None], KIND)
        place = (row * n_classes)[:, None] + c[None, :]
        if grad_first_ptr is not None:
            grad_a = round_to(weight[:, None] * to_a, DTYPE)
            tl.store(grad_first_ptr + place, grad_a, mask=inside)
        if grad_second_ptr is not None:
            grad_b = round_to(weight[:, None] * to_b, DTYPE)
            tl.store(grad_second_ptr + place, grad_b, mask=inside)


@triton.jit(
    do_not_specialize=[
        "class_counts", "first_strides", "second_strides", "grad_ptr", "numbers_ptr", "n_rows",
    ]
)  # fmt: skip
def _logit_divergence_backward_kernel(
    grad_first_ptrs, grad_second_ptrs, first_ptrs, second_ptrs, class_counts, first_strides,
    second_strides, grad_ptr, numbers_ptr, n_rows, KIND: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of rows of one pair; grid (tiles, K)."""
    k = tl.program_id(1)
    n_rows = n_rows.to(tl.int64)  # six of them are more than an int32 holds
    of_pair = k * n_rows
    for m in tl.static_range(len(first_ptrs)):
        if k == m:
            _backward_rows(
                grad_first_ptrs[m], grad_second_ptrs[m], first_ptrs[m], second_ptrs[m],
                class_counts[m], first_strides[m], second_strides[m], KIND, PER_ROW,
                grad_ptr + (of_pair if PER_ROW else k), numbers_ptr + of_pair * _NUMBERS, n_rows,
                BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


class _Call(NamedTuple):
    """Arguments that both passes share."""

    pairs: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: int
    dtype: torch.dtype


def _call_of(first: Sequence[Tensor], second: Sequence[Tensor], kind: int, per_row: bool) -> _Call:
    wide = any(z.dtype == torch.float64 for z in first)
    class_counts = tuple(z.shape[1] for z in first)
    tile_rows, block_classes = blocks_for(max(class_counts), wide)
    block_rows = tile_rows // 2  # of either logits
    strides = (tuple(z.stride(0) for z in logits) for logits in (first, second))
    return _Call(
        (tuple(first), tuple(second), class_counts, *strides),
        {
            "KIND": kind,
            "PER_ROW": per_row,
            "BLOCK_ROWS": block_rows,
            "BLOCK_CLASSES": block_classes,
            "num_warps": NUM_WARPS,
            **COMPILE_OPTIONS,
        },
        triton.cdiv(first[0].shape[0], block_rows),
        torch.float64 if wide else torch.float32,
    )


def logit_divergence(
    first: Sequence[Tensor], second: Sequence[Tensor], kind: int, per_row: bool
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.logit_divergence`."""
    call = _call_of(first, second, kind, per_row)
    count, rows, device = len(first), first[0].shape[0], first[0].device
    value = torch.empty([count, rows] if per_row else [count], dtype=call.dtype, device=device)
    numbers = torch.empty([count, ROW_NUMBERS, rows], dtype=call.dtype, device=device)
    most = MAX_SPLITS if not per_row else call.tiles
    splits = 1 if call.tiles <= TILES_IN_ONE_LAUNCH and not per_row else min(call.tiles, most)
    sums = None
    if splits > 1 and not per_row:
        sums = torch.empty([count, splits], dtype=torch.float64, device=device)
    if splits == 0:
        return value, numbers
    with launch_on(device):
        _logit_divergence_kernel[(splits, count)](
            *call.pairs,
            value,
            sums,
            numbers,
            rows,
            call.tiles,
            triton.cdiv(call.tiles, splits),
            **call.constants,
        )
        if sums is not None:
            _logit_divergence_merge_kernel[(count,)](
                sums,
                value,
                rows,
                splits,
                BLOCK_SIZE=MAX_SPLITS,
                num_warps=MERGE_WARPS,
                **COMPILE_OPTIONS,
            )
    return value, numbers


def logit_divergence_backward(
    grad: Tensor,
    rows: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    kind: int,
    to_first: bool,
    to_second: bool,
) -> list[Tensor]:
    """See `mmfuse.reference.logit_divergence`."""
    call = _call_of(first, second, kind, grad.dim() == 2)
    grads = [
        [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits] * wanted
        for logits, wanted in ((first, to_first), (second, to_second))
    ]
    nothing = (None,) * len(first)
    if call.tiles and (to_first or to_second):
        with launch_on(grad.device):
            _logit_divergence_backward_kernel[(call.tiles, len(first))](
                *(tuple(each) or nothing for each in grads),
                *call.pairs,
                grad,
                rows,
                first[0].shape[0],
                **call.constants,
            )
    return [*grads[0], *grads[1]]
