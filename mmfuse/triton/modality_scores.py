"""Scores of the targets: one launch for a small batch, two for a large one; backward one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import round_to, widen
from ._score_call import call_of, layout_of
from ._score_means import launch_means, store_means
from ._score_rows import (
    INDICES,
    LABELS,
    SHARES,
    class_places,
    class_weights,
    label_tile,
    read_targets,
    row_places,
    score_tile,
    tile_of_rows,
)
from ._score_statistics import modality_accuracies, sample_statistics
from ._tensor_list import launch_on

__all__ = [
    "modality_accuracies",
    "modality_scores",
    "modality_scores_backward",
    "sample_scores",
    "sample_statistics",
]


@triton.jit
def _target_ptrs(target_ptr, outer, row, inner, target_strides, KIND: tl.constexpr):
    if KIND == INDICES:
        ptrs = target_ptr + (outer.to(tl.int64) * inner + row)
    else:
        place = outer.to(tl.int64) * target_strides[0] + row.to(tl.int64) * target_strides[2]
        ptrs = target_ptr + place
    return ptrs


@triton.jit
def _score_rows(
    logits_ptr, n_classes, outer_stride, stride, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    target_ptr, target_strides, weight_ptr, pos_weight_ptr, ignore_index, inner, first_tile,
    end_tile, prob_ptr, log_prob_ptr, count_ptr, sum_ptr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes the means of p and ln p over rows, and the rows' weight if count_ptr wants it.

    With sum_ptr their sums instead, and the weight there.
    """
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    prob_sum = tl.zeros([BLOCK_ROWS], ACC)
    log_sum = tl.zeros([BLOCK_ROWS], ACC)
    weights = tl.zeros([BLOCK_ROWS], tl.float64)
    for tile in range(first_tile, end_tile):
        outer, row = tile_of_rows(tile, inner, BLOCK_ROWS)
        row_ptrs = logits_ptr + row_places(outer, row, outer_stride, stride, COLUMNS)
        target_ptrs = _target_ptrs(target_ptr, outer, row, inner, target_strides, KIND)
        _, _, prob, log_prob, weight = score_tile(
            row_ptrs, row < inner, n_classes, stride, COLUMNS, KIND, target_ptrs,
            target_strides[1], weight_ptr, pos_weight_ptr, ignore_index, ACC, BLOCK_CLASSES,
        )  # fmt: skip
        if KIND == INDICES and weight_ptr is None:
            prob_sum += prob
            log_sum += log_prob
        else:
            prob_sum += tl.where(weight == 0.0, 0.0, weight.to(ACC) * prob)
            log_sum += tl.where(weight == 0.0, 0.0, weight.to(ACC) * log_prob)
        weights += weight
    store_means(prob_sum, log_sum, weights, prob_ptr, log_prob_ptr, count_ptr, sum_ptr)


@triton.jit(
    do_not_specialize=[
        "class_counts", "outer_strides", "strides", "target_ptr", "target_strides", "weight_ptr",
        "pos_weight_ptr", "ignore_index", "prob_ptr", "log_prob_ptr", "count_ptr", "sum_ptr",
        "inner", "n_tiles", "tiles_per_program",
    ]
)  # fmt: skip
def _modality_scores_kernel(
    logits_ptrs, class_counts, outer_strides, strides, target_ptr, target_strides, weight_ptr,
    pos_weight_ptr, ignore_index, prob_ptr, log_prob_ptr, count_ptr, sum_ptr, inner, n_tiles,
    tiles_per_program, COLUMNS: tl.constexpr, KIND: tl.constexpr, WIDEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Scores rows of one modality; grid (splits, M), outputs [M, splits]."""
    first_tile = tl.program_id(0) * tiles_per_program
    end_tile = tl.minimum(first_tile + tiles_per_program, n_tiles)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # Each modality has a pointer type of its own, hence the branches.
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _score_rows(
                logits_ptrs[m], class_counts[m], outer_strides[m], strides[m],
                (COLUMNS >> m) & 1, KIND, target_ptr, target_strides, weight_ptr, pos_weight_ptr,
                ignore_index, inner, first_tile, end_tile, prob_ptr + place, log_prob_ptr + place,
                count_ptr if m == WIDEST else None,
                None if sum_ptr is None else sum_ptr + place, BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


@triton.jit
def _sample_rows(
    logits_ptr, n_classes, outer_stride, stride, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    target_ptr, target_strides, weight_ptr, pos_weight_ptr, ignore_index, inner, prob_ptr,
    log_prob_ptr, rows_ptr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes p, ln p, and with rows_ptr the weights, of a tile of rows."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    outer, row = tile_of_rows(tl.program_id(0), inner, BLOCK_ROWS)
    row_ptrs = logits_ptr + row_places(outer, row, outer_stride, stride, COLUMNS)
    target_ptrs = _target_ptrs(target_ptr, outer, row, inner, target_strides, KIND)
    _, _, prob, log_prob, weight = score_tile(
        row_ptrs, row < inner, n_classes, stride, COLUMNS, KIND, target_ptrs, target_strides[1],
        weight_ptr, pos_weight_ptr, ignore_index, ACC, BLOCK_CLASSES,
    )  # fmt: skip
    place = outer.to(tl.int64) * inner + row
    tl.store(prob_ptr + place, prob.to(prob_ptr.dtype.element_ty), mask=row < inner)
    tl.store(log_prob_ptr + place, log_prob.to(log_prob_ptr.dtype.element_ty), mask=row < inner)
    if rows_ptr is not None:
        tl.store(rows_ptr + place, weight, mask=row < inner)


@triton.jit(
    do_not_specialize=[
        "class_counts", "outer_strides", "strides", "target_ptr", "target_strides", "weight_ptr",
        "pos_weight_ptr", "ignore_index", "prob_ptr", "log_prob_ptr", "rows_ptr", "inner",
        "n_rows",
    ]
)  # fmt: skip
def _sample_scores_kernel(
    logits_ptrs, class_counts, outer_strides, strides, target_ptr, target_strides, weight_ptr,
    pos_weight_ptr, ignore_index, prob_ptr, log_prob_ptr, rows_ptr, inner, n_rows,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, WIDEST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Scores a tile of rows of one modality; grid (tiles, M), outputs [M, rows]."""
    first = tl.program_id(1).to(tl.int64) * n_rows
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _sample_rows(
                logits_ptrs[m], class_counts[m], outer_strides[m], strides[m],
                (COLUMNS >> m) & 1, KIND, target_ptr, target_strides, weight_ptr, pos_weight_ptr,
                ignore_index, inner, prob_ptr + first, log_prob_ptr + first,
                rows_ptr if m == WIDEST else None, BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


@triton.jit
def _backward_rows(
    grad_logits_ptr, grad_outer_stride, grad_stride, logits_ptr, n_classes, outer_stride, stride,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, target_ptr, target_strides, weight_ptr,
    pos_weight_ptr, ignore_index, grad_prob, grad_log_prob, count, inner,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """A tile's gradient: (grad_prob p + grad_log_prob) w / count (onehot - softmax) for indices."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    outer, row = tile_of_rows(tl.program_id(0), inner, BLOCK_ROWS)
    row_ptrs = logits_ptr + row_places(outer, row, outer_stride, stride, COLUMNS)
    out_ptrs = grad_logits_ptr + row_places(outer, row, grad_outer_stride, grad_stride, COLUMNS)
    target_ptrs = _target_ptrs(target_ptr, outer, row, inner, target_strides, KIND)
    top, total, p, _, weight = score_tile(
        row_ptrs, row < inner, n_classes, stride, COLUMNS, KIND, target_ptrs, target_strides[1],
        weight_ptr, pos_weight_ptr, ignore_index, ACC, BLOCK_CLASSES,
    )  # fmt: skip
    used = weight != 0.0
    grad_prob = grad_prob.to(ACC)
    grad_log_prob = grad_log_prob.to(ACC)
    count = count.to(ACC)
    factor = (grad_prob * p + grad_log_prob) / count
    if KIND == SHARES or weight_ptr is not None:
        factor = factor * weight.to(ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        inside = (row < inner)[:, None] & (c < n_classes)[None, :]
        if KIND == LABELS:
            # Another name than above: in a loop a variable keeps its type.
            share, s, _log_s, slope = label_tile(
                row_ptrs, row < inner, c, n_classes, stride, COLUMNS, target_ptrs,
                target_strides[1], weight_ptr, pos_weight_ptr, ACC,
            )  # fmt: skip
            part = share / total[:, None]
            grad = (grad_prob * s + grad_log_prob) / count * slope * part
            grad = tl.where(part == 0.0, 0.0, grad)
        else:
            ptrs = row_ptrs[:, None] + class_places(c, stride, COLUMNS)[None, :]
            x = tl.load(ptrs, mask=inside & used[:, None], other=0.0)
            softmax = tl.exp(widen(x, ACC) - top[:, None]) / total[:, None]
            if KIND == INDICES:
                label = tl.load(target_ptrs, mask=row < inner, other=0)
                own = tl.where(c[None, :] == label[:, None], 1.0, 0.0)
                grad = factor[:, None] * (own - softmax)
            else:
                t = read_targets(target_ptrs, c, target_strides[1], inside, ACC)
                a = class_weights(weight_ptr, c, n_classes, ACC) * t
                grad = a * (grad_prob * softmax + grad_log_prob) / count
                grad = grad - factor[:, None] * softmax
        grad = tl.where(used[:, None], grad, 0.0)
        out = out_ptrs[:, None] + class_places(c, grad_stride, COLUMNS)[None, :]
        tl.store(out, round_to(grad, DTYPE), mask=inside)


@triton.jit(
    do_not_specialize=[
        "grad_outer_strides", "grad_strides", "class_counts", "outer_strides", "strides",
        "target_ptr", "target_strides", "weight_ptr", "pos_weight_ptr", "ignore_index",
        "grad_prob_ptr", "grad_log_prob_ptr", "count_ptr", "inner",
    ]
)  # fmt: skip
def _modality_scores_backward_kernel(
    grad_logits_ptrs, grad_outer_strides, grad_strides, logits_ptrs, class_counts, outer_strides,
    strides, target_ptr, target_strides, weight_ptr, pos_weight_ptr, ignore_index, grad_prob_ptr,
    grad_log_prob_ptr, count_ptr, inner, COLUMNS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of rows of one modality; grid (tiles, M)."""
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _backward_rows(
                grad_logits_ptrs[m], grad_outer_strides[m], grad_strides[m], logits_ptrs[m],
                class_counts[m], outer_strides[m], strides[m], (COLUMNS >> m) & 1, KIND,
                target_ptr, target_strides, weight_ptr, pos_weight_ptr, ignore_index,
                tl.load(grad_prob_ptr + m), tl.load(grad_log_prob_ptr + m), tl.load(count_ptr),
                inner, BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


def modality_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modality_scores`."""
    call = call_of(logits, labels, weight, pos_weight, ignore_index, multilabel)
    return launch_means(_modality_scores_kernel, call, logits, call.rows, call.constants)


def sample_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.sample_scores`."""
    call = call_of(logits, labels, weight, pos_weight, ignore_index, multilabel)
    shape = list(labels.shape)
    if labels.is_floating_point():
        del shape[1]
    prob = torch.empty([len(logits), *shape], dtype=call.dtype, device=labels.device)
    log_prob = torch.empty_like(prob)
    rows = torch.empty(shape, dtype=torch.float64, device=labels.device)
    if call.tiles:
        with launch_on(labels.device):
            _sample_scores_kernel[(call.tiles, len(logits))](
                tuple(logits),
                *call.rows,
                prob,
                log_prob,
                rows,
                call.inner,
                rows.numel(),
                WIDEST=call.widest,
                **call.constants,
            )
    return prob, log_prob, rows


def modality_scores_backward(
    grad_prob: Tensor,
    grad_log_prob: Tensor,
    count: Tensor,
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> list[Tensor]:
    """See `mmfuse.reference.modality_scores`."""
    call = call_of(logits, labels, weight, pos_weight, ignore_index, multilabel)
    grads = [torch.empty_like(z) for z in logits]
    if call.tiles:
        with launch_on(labels.device):
            _modality_scores_backward_kernel[(call.tiles, len(logits))](
                tuple(grads),
                *layout_of(grads),
                tuple(logits),
                *call.rows,
                grad_prob,
                grad_log_prob,
                count,
                call.inner,
                **call.constants,
            )
    return grads
