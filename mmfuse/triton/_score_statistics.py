"""sample_statistics and modality_accuracies: what one read of the logits says beside the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import add_exactly, widen
from ._score_call import Call, call_of
from ._score_means import launch_means, store_means
from ._score_rows import class_places, index_weights, row_places, shared, tile_of_rows, true_logit
from ._tensor_list import launch_on


@triton.jit
def _statistics_tile(
    row_ptrs, rows, n_classes, stride, COLUMNS: tl.constexpr, label_ptrs, weight_ptr,
    ignore_index, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Scores, statistics, correctness and weight of a tile of rows; 0 where one does not count."""
    label = tl.load(label_ptrs, mask=rows, other=0)
    weight = index_weights(label, rows, ignore_index, weight_ptr, n_classes)
    used = weight != 0.0
    own = true_logit(row_ptrs, used, label, n_classes, stride, COLUMNS, ACC)
    top = tl.full(rows.shape, float("-inf"), ACC)
    total = tl.zeros(rows.shape, ACC)
    below_sum = tl.zeros(rows.shape, ACC)
    abs_sum = tl.zeros(rows.shape, ACC)
    total_low = tl.zeros(rows.shape, ACC)
    below_low = tl.zeros(rows.shape, ACC)
    abs_low = tl.zeros(rows.shape, ACC)
    ahead = tl.zeros(rows.shape, tl.int32)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        inside = used[:, None] & (c < n_classes)[None, :]
        ptrs = row_ptrs[:, None] + class_places(c, stride, COLUMNS)[None, :]
        x = widen(tl.load(ptrs, mask=inside, other=float("-inf")), ACC)
        first = (x == own[:, None]) & (c[None, :] < label[:, None])
        beaten = inside & ((x > own[:, None]) | first)
        ahead += tl.sum(beaten.to(tl.int32), axis=1)
        sizes = tl.sum(tl.where(inside, tl.abs(x), 0.0), axis=1)
        abs_sum, abs_low = add_exactly(sizes, abs_sum, abs_low)
        # A NaN reaches the sum, not the maximum, where backends differ.
        new_top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        before = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp(top - shift)
        lower = tl.where(total == 0.0, 0.0, before - shift)
        below = x - shift[:, None]
        e = tl.exp(below)
        # The sum so far, with the higher maximum.
        moved = shared(factor, lower * (total + total_low))
        more = moved + tl.sum(shared(e, below), axis=1)
        below_sum, below_low = shared(factor, below_sum), shared(factor, below_low)
        below_sum, below_low = add_exactly(more, below_sum, below_low)
        total, total_low = add_exactly(tl.sum(e, axis=1), total * factor, total_low * factor)
        top = new_top
    total, below_sum, abs_sum = total + total_low, below_sum + below_low, abs_sum + abs_low
    shift = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log(total)
    log_prob = own - shift - log_total
    # Without a class that can be, softmax is 0 / 0.
    undefined = (total > 0.0) == 0
    defined = tl.where(undefined, float("nan"), 0.0)
    prob = tl.where(used, tl.exp(own - shift) / total + defined, 0.0)
    log_prob = tl.where(used, log_prob + defined, 0.0)
    entropy = tl.where(used, log_total - below_sum / total + defined, 0.0)
    log_sum_exp = tl.where(used, shift + log_total + defined, 0.0)
    abs_sum = tl.where(used, abs_sum, 0.0)
    possible = (label >= 0) & (label < n_classes)
    correct = used & possible & (ahead == 0) & (undefined == 0)
    return prob, log_prob, entropy, log_sum_exp, abs_sum, correct, weight


@triton.jit
def _statistics_rows(
    logits_ptr, n_classes, outer_stride, stride, COLUMNS: tl.constexpr, label_ptr, weight_ptr,
    ignore_index, inner, prob_ptr, log_prob_ptr, entropy_ptr, log_sum_exp_ptr, abs_sum_ptr,
    correct_ptr, rows_ptr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes the scores and statistics of a tile of rows, and with rows_ptr the weights."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    outer, row = tile_of_rows(tl.program_id(0), inner, BLOCK_ROWS)
    rows = row < inner
    place = outer.to(tl.int64) * inner + row
    row_ptrs = logits_ptr + row_places(outer, row, outer_stride, stride, COLUMNS)
    prob, log_prob, entropy, log_sum_exp, abs_sum, correct, weight = _statistics_tile(
        row_ptrs, rows, n_classes, stride, COLUMNS, label_ptr + place, weight_ptr, ignore_index,
        ACC, BLOCK_CLASSES,
    )  # fmt: skip
    out = prob_ptr.dtype.element_ty
    tl.store(prob_ptr + place, prob.to(out), mask=rows)
    tl.store(log_prob_ptr + place, log_prob.to(out), mask=rows)
    tl.store(entropy_ptr + place, entropy.to(out), mask=rows)
    tl.store(log_sum_exp_ptr + place, log_sum_exp.to(out), mask=rows)
    tl.store(abs_sum_ptr + place, abs_sum.to(out), mask=rows)
    tl.store(correct_ptr + place, correct, mask=rows)
    if rows_ptr is not None:
        tl.store(rows_ptr + place, weight, mask=rows)


@triton.jit(
    do_not_specialize=[
        "class_counts", "outer_strides", "strides", "label_ptr", "weight_ptr", "ignore_index",
        "prob_ptr", "log_prob_ptr", "entropy_ptr", "log_sum_exp_ptr", "abs_sum_ptr",
        "correct_ptr", "rows_ptr", "inner", "n_rows",
    ]
)  # fmt: skip
def _sample_statistics_kernel(
    logits_ptrs, class_counts, outer_strides, strides, label_ptr, weight_ptr, ignore_index,
    prob_ptr, log_prob_ptr, entropy_ptr, log_sum_exp_ptr, abs_sum_ptr, correct_ptr, rows_ptr,
    inner, n_rows, COLUMNS: tl.constexpr, WIDEST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The statistics of a tile of rows of one modality; grid (tiles, M)."""
    first = tl.program_id(1).to(tl.int64) * n_rows
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _statistics_rows(
                logits_ptrs[m], class_counts[m], outer_strides[m], strides[m],
                (COLUMNS >> m) & 1, label_ptr, weight_ptr, ignore_index, inner, prob_ptr + first,
                log_prob_ptr + first, entropy_ptr + first, log_sum_exp_ptr + first,
                abs_sum_ptr + first, correct_ptr + first, rows_ptr if m == WIDEST else None,
                BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


@triton.jit
def _accurate_rows(
    logits_ptr, n_classes, outer_stride, stride, COLUMNS: tl.constexpr, label_ptr, weight_ptr,
    ignore_index, inner, first_tile, end_tile, accuracy_ptr, prob_ptr, count_ptr, sum_ptr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes the share of rows that are right, the mean of p, and the weight, as `store_means`."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    right = tl.zeros([BLOCK_ROWS], tl.float64)
    prob_sum = tl.zeros([BLOCK_ROWS], tl.float64)
    weights = tl.zeros([BLOCK_ROWS], tl.float64)
    for tile in range(first_tile, end_tile):
        outer, row = tile_of_rows(tile, inner, BLOCK_ROWS)
        row_ptrs = logits_ptr + row_places(outer, row, outer_stride, stride, COLUMNS)
        label_ptrs = label_ptr + (outer.to(tl.int64) * inner + row)
        prob, _, _, _, _, correct, weight = _statistics_tile(
            row_ptrs, row < inner, n_classes, stride, COLUMNS, label_ptrs, weight_ptr,
            ignore_index, ACC, BLOCK_CLASSES,
        )  # fmt: skip
        right += tl.where(correct, weight, 0.0)
        prob_sum += tl.where(weight == 0.0, 0.0, weight * prob.to(tl.float64))
        weights += weight
    store_means(right, prob_sum, weights, accuracy_ptr, prob_ptr, count_ptr, sum_ptr)


@triton.jit(
    do_not_specialize=[
        "class_counts", "outer_strides", "strides", "label_ptr", "weight_ptr", "ignore_index",
        "accuracy_ptr", "prob_ptr", "count_ptr", "sum_ptr", "inner", "n_tiles",
        "tiles_per_program",
    ]
)  # fmt: skip
def _modality_accuracies_kernel(
    logits_ptrs, class_counts, outer_strides, strides, label_ptr, weight_ptr, ignore_index,
    accuracy_ptr, prob_ptr, count_ptr, sum_ptr, inner, n_tiles, tiles_per_program,
    COLUMNS: tl.constexpr, WIDEST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Sums over rows of one modality; grid (splits, M), outputs [M, splits]."""
    first_tile = tl.program_id(0) * tiles_per_program
    end_tile = tl.minimum(first_tile + tiles_per_program, n_tiles)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for m in tl.static_range(len(logits_ptrs)):
        if tl.program_id(1) == m:
            _accurate_rows(
                logits_ptrs[m], class_counts[m], outer_strides[m], strides[m],
                (COLUMNS >> m) & 1, label_ptr, weight_ptr, ignore_index, inner, first_tile,
                end_tile, accuracy_ptr + place, prob_ptr + place,
                count_ptr if m == WIDEST else None,
                None if sum_ptr is None else sum_ptr + place, BLOCK_ROWS, BLOCK_CLASSES,
            )  # fmt: skip


def _arguments(call: Call, weight: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those of the kernels here, which know one kind of targets alone."""
    class_counts, outer_strides, strides, labels, _, _, _, ignore_index = call.rows
    rows = class_counts, outer_strides, strides, labels, weight, ignore_index
    return rows, {key: value for key, value in call.constants.items() if key != "KIND"}


def modality_accuracies(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modality_accuracies`."""
    call = call_of(logits, labels, weight, pos_weight, ignore_index, multilabel)
    rows, constants = _arguments(call, weight)
    return launch_means(_modality_accuracies_kernel, call, logits, rows, constants, torch.float64)


def sample_statistics(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, ...]:
    """See `mmfuse.reference.modality_scores`."""
    call = call_of(logits, labels, weight, pos_weight, ignore_index, multilabel)
    each, device = [len(logits), *labels.shape], labels.device
    numbers = [torch.empty(each, dtype=call.dtype, device=device) for _ in range(5)]
    correct = torch.empty(each, dtype=torch.bool, device=device)
    rows = torch.empty(labels.shape, dtype=torch.float64, device=device)
    arguments, constants = _arguments(call, weight)
    if call.tiles:
        with launch_on(device):
            _sample_statistics_kernel[(call.tiles, len(logits))](
                tuple(logits),
                *arguments,
                *numbers,
                correct,
                rows,
                call.inner,
                rows.numel(),
                WIDEST=call.widest,
                **constants,
            )
    prob, log_prob, entropy, log_sum_exp, abs_sum = numbers
    return prob, log_prob, rows, correct, entropy, log_sum_exp, abs_sum
