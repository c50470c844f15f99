"""Scores of the true class: one launch for a small batch, two for a large one; backward one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.modality_scores import IGNORED_LABEL
from ._aot import COMPILE_OPTIONS
from ._device import round_to, widen
from ._tensor_list import launch_on

_IGNORED_LABEL = tl.constexpr(IGNORED_LABEL)

TILE_BYTES = 16384
MAX_BLOCK_CLASSES = 1024
NUM_WARPS = 8
# Up to so many tiles of rows, one program takes them all and needs no second launch.
TILES_IN_ONE_LAUNCH = 8
MAX_SPLITS = 256
MERGE_WARPS = 4
LABEL_BLOCK = 1024


def blocks_for(max_classes: int, wide: bool) -> tuple[int, int]:
    """Rows and classes of a tile, which is held in registers as float32, or float64 if wide."""
    classes = min(max(triton.next_power_of_2(max_classes), 16), MAX_BLOCK_CLASSES)
    return TILE_BYTES // (8 if wide else 4) // classes, classes


@triton.jit
def _max_and_sum(row_ptrs, used, n_classes, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr):
    """Each row's maximum, 0 in place of -inf, and its sum of exp(x - maximum), in one pass."""
    top = tl.full(used.shape, float("-inf"), ACC)
    total = tl.zeros(used.shape, ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        mask = used[:, None] & (c < n_classes)[None, :]
        x = tl.load(row_ptrs[:, None] + c[None, :], mask=mask, other=float("-inf"))
        x = widen(x, ACC)
        # A NaN reaches the sum, not the maximum, where backends differ.
        new_top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top), total


@triton.jit
def _true_logit(row_ptrs, used, label, n_classes, ACC: tl.constexpr):
    """The true class's logit; NaN where the label is no class."""
    possible = (label >= 0) & (label < n_classes)
    x = widen(tl.load(row_ptrs + label, mask=used & possible, other=0.0), ACC)
    return tl.where(possible, x, float("nan"))


@triton.jit
def _score_rows(
    logits_ptr,
    n_classes,
    labels_ptr,
    first_row,
    end_row,
    prob_ptr,
    log_prob_ptr,
    count_ptr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Writes the means of p and ln p over rows, or their sums and the count when asked for it."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    prob_sum = tl.zeros([BLOCK_ROWS], ACC)
    log_sum = tl.zeros([BLOCK_ROWS], ACC)
    counts = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(first_row, end_row, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        label = tl.load(labels_ptr + row, mask=row < end_row, other=_IGNORED_LABEL)
        used = label != _IGNORED_LABEL
        row_ptrs = logits_ptr + row.to(tl.int64) * n_classes
        top, total = _max_and_sum(row_ptrs, used, n_classes, ACC, BLOCK_CLASSES)
        x = _true_logit(row_ptrs, used, label, n_classes, ACC) - top
        prob_sum += tl.where(used, tl.exp(x) / total, 0.0)
        log_sum += tl.where(used, x - tl.log(total), 0.0)
        counts += used.to(tl.int32)
    out = prob_ptr.dtype.element_ty
    prob = tl.sum(prob_sum, axis=0)
    log_prob = tl.sum(log_sum, axis=0)
    count = tl.sum(counts, axis=0)
    if count_ptr is None:
        prob = prob / count.to(ACC)
        log_prob = log_prob / count.to(ACC)
    else:
        tl.store(count_ptr, count.to(out))
    tl.store(prob_ptr, prob.to(out))
    tl.store(log_prob_ptr, log_prob.to(out))


@triton.jit(
    do_not_specialize=[
        "class_counts", "labels_ptr", "prob_ptr", "log_prob_ptr", "count_ptr", "n_rows",
        "rows_per_program",
    ]
)  # fmt: skip
def _modality_scores_kernel(
    logits_ptrs,
    class_counts,
    labels_ptr,
    prob_ptr,
    log_prob_ptr,
    count_ptr,
    n_rows,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Scores rows of one modality; grid (splits, M), outputs [M, splits]."""
    first_row = tl.program_id(0) * rows_per_program
    end_row = tl.minimum(first_row + rows_per_program, n_rows)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # Each modality has a pointer type of its own, hence the branches.
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _score_rows(
                logits_ptrs[m],
                class_counts[m],
                labels_ptr,
                first_row,
                end_row,
                prob_ptr + place,
                log_prob_ptr + place,
                None if count_ptr is None else count_ptr + place,
                BLOCK_ROWS,
                BLOCK_CLASSES,
            )


@triton.jit(do_not_specialize=["sums_ptr", "prob_ptr", "log_prob_ptr", "n_splits"])
def _modality_scores_merge_kernel(
    sums_ptr, prob_ptr, log_prob_ptr, n_splits, BLOCK_SIZE: tl.constexpr
):
    """Means of one modality from float64 sums [3, M, splits] of p, of ln p, and of rows."""
    m = tl.program_id(0)
    stride = tl.num_programs(0) * n_splits
    lane = tl.arange(0, BLOCK_SIZE)
    first_ptr = sums_ptr + m * n_splits + lane
    used = lane < n_splits
    prob = tl.sum(tl.load(first_ptr, mask=used, other=0.0), axis=0)
    log_prob = tl.sum(tl.load(first_ptr + stride, mask=used, other=0.0), axis=0)
    count = tl.sum(tl.load(first_ptr + 2 * stride, mask=used, other=0.0), axis=0)
    tl.store(prob_ptr + m, (prob / count).to(prob_ptr.dtype.element_ty))
    tl.store(log_prob_ptr + m, (log_prob / count).to(log_prob_ptr.dtype.element_ty))


@triton.jit
def _backward_rows(
    grad_logits_ptr,
    logits_ptr,
    n_classes,
    labels_ptr,
    grad_prob,
    grad_log_prob,
    count,
    row,
    n_rows,
    BLOCK_CLASSES: tl.constexpr,
):
    """(grad_prob p + grad_log_prob) / count * (onehot - softmax) of a tile of rows."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    label = tl.load(labels_ptr + row, mask=row < n_rows, other=_IGNORED_LABEL)
    used = label != _IGNORED_LABEL
    first = row.to(tl.int64) * n_classes
    row_ptrs = logits_ptr + first
    top, total = _max_and_sum(row_ptrs, used, n_classes, ACC, BLOCK_CLASSES)
    p = tl.exp(_true_logit(row_ptrs, used, label, n_classes, ACC) - top) / total
    weight = (grad_prob.to(ACC) * p + grad_log_prob.to(ACC)) / count.to(ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        inside = (row < n_rows)[:, None] & (c < n_classes)[None, :]
        x = tl.load(row_ptrs[:, None] + c[None, :], mask=inside & used[:, None], other=0.0)
        softmax = tl.exp(widen(x, ACC) - top[:, None]) / total[:, None]
        onehot = tl.where(c[None, :] == label[:, None], 1.0, 0.0)
        grad = tl.where(used[:, None], weight[:, None] * (onehot - softmax), 0.0)
        out_ptrs = grad_logits_ptr + first[:, None] + c[None, :]
        tl.store(out_ptrs, round_to(grad, DTYPE), mask=inside)


@triton.jit(
    do_not_specialize=[
        "class_counts", "labels_ptr", "grad_prob_ptr", "grad_log_prob_ptr", "n_rows",
    ]
)  # fmt: skip
def _modality_scores_backward_kernel(
    grad_logits_ptrs,
    logits_ptrs,
    class_counts,
    labels_ptr,
    grad_prob_ptr,
    grad_log_prob_ptr,
    n_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
):
    """Gradient of a tile of rows of one modality; grid (tiles, M)."""
    # Every program counts the rows for itself, which spares a launch.
    counts = tl.zeros([LABEL_BLOCK], tl.int32)
    for start in range(0, n_rows, LABEL_BLOCK):
        i = start + tl.arange(0, LABEL_BLOCK)
        label = tl.load(labels_ptr + i, mask=i < n_rows, other=_IGNORED_LABEL)
        counts += (label != _IGNORED_LABEL).to(tl.int32)
    count = tl.sum(counts, axis=0)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _backward_rows(
                grad_logits_ptrs[m],
                logits_ptrs[m],
                class_counts[m],
                labels_ptr,
                tl.load(grad_prob_ptr + m),
                tl.load(grad_log_prob_ptr + m),
                count,
                row,
                n_rows,
                BLOCK_CLASSES,
            )


def sample_scores(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.sample_scores`."""
    raise NotImplementedError("triton has no sample_scores yet")


def _only_plain(logits: Sequence[Tensor], others: tuple[object, ...]) -> None:
    if others != (None, None, IGNORED_LABEL, False) or not all(z.is_contiguous() for z in logits):
        raise NotImplementedError("triton has [B, C] with class indices only")


def modality_scores(
    logits: Sequence[Tensor], labels: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modality_scores`."""
    _only_plain(logits, others)
    wide = any(z.dtype == torch.float64 for z in logits)
    dtype = torch.float64 if wide else torch.float32
    count, n_rows = len(logits), labels.shape[0]
    prob = torch.empty(count, dtype=dtype, device=labels.device)
    log_prob = torch.empty_like(prob)
    class_counts = tuple(z.shape[1] for z in logits)
    block_rows, block_classes = blocks_for(max(class_counts), wide)
    tiles = triton.cdiv(n_rows, block_rows)
    splits = 1 if tiles <= TILES_IN_ONE_LAUNCH else min(tiles, MAX_SPLITS)
    rows_per_program = triton.cdiv(tiles, splits) * block_rows
    sums = None
    outputs: tuple[Tensor | None, ...] = (prob, log_prob, None)
    if splits > 1:
        sums = torch.empty((3, count, splits), dtype=torch.float64, device=labels.device)
        outputs = sums.unbind(0)
    with launch_on(labels.device):
        _modality_scores_kernel[(splits, count)](
            tuple(logits),
            class_counts,
            labels,
            *outputs,
            n_rows,
            rows_per_program,
            BLOCK_ROWS=block_rows,
            BLOCK_CLASSES=block_classes,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
        if sums is not None:
            _modality_scores_merge_kernel[(count,)](
                sums,
                prob,
                log_prob,
                splits,
                BLOCK_SIZE=MAX_SPLITS,
                num_warps=MERGE_WARPS,
                **COMPILE_OPTIONS,
            )
    return prob, log_prob, (labels != IGNORED_LABEL).sum().double()


def modality_scores_backward(
    grad_prob: Tensor,
    grad_log_prob: Tensor,
    count: Tensor,
    logits: Sequence[Tensor],
    labels: Tensor,
    *others: object,
) -> list[Tensor]:
    """Gradient of both scores: (grad_prob p_i + grad_log_prob) / n * (onehot - softmax)."""
    _only_plain(logits, others)
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]
    n_rows = labels.shape[0]
    class_counts = tuple(z.shape[1] for z in logits)
    wide = any(z.dtype == torch.float64 for z in logits)
    block_rows, block_classes = blocks_for(max(class_counts), wide)
    if n_rows:
        with launch_on(labels.device):
            _modality_scores_backward_kernel[(triton.cdiv(n_rows, block_rows), len(logits))](
                tuple(grads),
                tuple(logits),
                class_counts,
                labels,
                grad_prob,
                grad_log_prob,
                n_rows,
                BLOCK_ROWS=block_rows,
                BLOCK_CLASSES=block_classes,
                LABEL_BLOCK=LABEL_BLOCK,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return grads
