"""The scores of a tile of rows, against each kind of target; modality_scores has the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import add_exactly, widen

# Class indices; probabilities of the classes; a yes or no for each label.
INDICES = tl.constexpr(0)
SHARES = tl.constexpr(1)
LABELS = tl.constexpr(2)


@triton.jit
def tile_of_rows(tile, inner, BLOCK_ROWS: tl.constexpr):
    """The tile's outer and inner rows, int64; all of a tile are of one outer."""
    # Fewer than 2^31, and divided by as such: rows may be more.
    tiles = tl.cdiv(inner.to(tl.int64), BLOCK_ROWS).to(tl.int32)
    return tile // tiles, (tile % tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def row_places(outer, inner, outer_stride, stride, COLUMNS: tl.constexpr):
    """Offsets of rows: with COLUMNS the rows are one by one in memory, else their classes are."""
    first = outer.to(tl.int64) * outer_stride
    return first + (inner if COLUMNS else inner.to(tl.int64) * stride)


@triton.jit
def class_places(c, stride, COLUMNS: tl.constexpr):
    """How far the classes are from the row's first."""
    return c.to(tl.int64) * stride if COLUMNS else c


@triton.jit
def max_and_sum(
    row_ptrs, used, n_classes, stride, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Each row's maximum, 0 in place of -inf, and its sum of exp(x - maximum), in one pass."""
    top = tl.full(used.shape, float("-inf"), ACC)
    total = tl.zeros(used.shape, ACC)
    low = tl.zeros(used.shape, ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        mask = used[:, None] & (c < n_classes)[None, :]
        ptrs = row_ptrs[:, None] + class_places(c, stride, COLUMNS)[None, :]
        x = widen(tl.load(ptrs, mask=mask, other=float("-inf")), ACC)
        # A NaN reaches the sum, not the maximum, where backends differ.
        new_top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp(top - shift)
        e = tl.sum(tl.exp(x - shift[:, None]), axis=1)
        total, low = add_exactly(e, total * factor, low * factor)
        top = new_top
    return tl.where(top == float("-inf"), 0.0, top), total + low


@triton.jit
def true_logit(
    row_ptrs, used, label, n_classes, stride, COLUMNS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The true class's logit; NaN where the label is no class."""
    possible = (label >= 0) & (label < n_classes)
    place = class_places(label, stride, COLUMNS)
    x = widen(tl.load(row_ptrs + place, mask=used & possible, other=0.0), ACC)
    return tl.where(possible, x, float("nan"))


@triton.jit
def class_weights(weight_ptr, c, n_classes, ACC: tl.constexpr):
    """[1, classes], 1 where none are given."""
    if weight_ptr is None:
        found = tl.full(c.shape, 1.0, ACC)
    else:
        found = tl.load(weight_ptr + c, mask=c < n_classes, other=0.0).to(ACC)
    return found[None, :]


@triton.jit
def read_targets(target_ptrs, c, class_stride, mask, ACC: tl.constexpr):
    """[rows, classes] targets: 0 beyond the mask, NaN outside of [0, 1]."""
    ptrs = target_ptrs[:, None] + (c.to(tl.int64) * class_stride)[None, :]
    t = widen(tl.load(ptrs, mask=mask, other=0.0), ACC)
    return tl.where((t >= 0.0) & (t <= 1.0), t, float("nan"))


@triton.jit
def shared(a, x):
    """A share of x; of nothing 0, whatever x is."""
    return tl.where(a == 0.0, 0.0, a * x)


@triton.jit
def likelihood(z, y):
    """The probability of labels y under z, its logarithm, and the logarithm's derivative."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    # The part of e that 1 + e has rounded away, for log1p.
    rest = e - (u - 1.0)
    against = shared(1.0 - y, tl.where(z > 0.0, z, 0.0)) + shared(y, tl.where(z < 0.0, -z, 0.0))
    log_prob = -(tl.log(u) + rest + against)
    return tl.exp(log_prob), log_prob, y - tl.where(z < 0.0, e, 1.0) / u


@triton.jit
def label_tile(
    row_ptrs, rows, c, n_classes, stride, COLUMNS: tl.constexpr, target_ptrs, target_stride,
    weight_ptr, pos_weight_ptr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of labels: shares in their row's score, and `likelihood`."""
    mask = rows[:, None] & (c < n_classes)[None, :]
    z = tl.load(row_ptrs[:, None] + class_places(c, stride, COLUMNS)[None, :], mask=mask, other=0.0)
    y = read_targets(target_ptrs, c, target_stride, mask, ACC)
    pos = class_weights(pos_weight_ptr, c, n_classes, ACC)
    share = class_weights(weight_ptr, c, n_classes, ACC) * (pos * y + (1.0 - y))
    p, log_p, slope = likelihood(widen(z, ACC), y)
    return tl.where(mask, share, 0.0), p, log_p, slope


@triton.jit
def sum_labels(
    row_ptrs, rows, n_classes, stride, COLUMNS: tl.constexpr, target_ptrs, target_stride,
    weight_ptr, pos_weight_ptr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Each row's mean over the labels of p and of ln p, and the sum of the shares."""
    prob = tl.zeros(rows.shape, ACC)
    log_prob = tl.zeros(rows.shape, ACC)
    total = tl.zeros(rows.shape, ACC)
    prob_low = tl.zeros(rows.shape, ACC)
    log_low = tl.zeros(rows.shape, ACC)
    total_low = tl.zeros(rows.shape, ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        share, p, log_p, _ = label_tile(
            row_ptrs, rows, c, n_classes, stride, COLUMNS, target_ptrs, target_stride,
            weight_ptr, pos_weight_ptr, ACC,
        )  # fmt: skip
        prob, prob_low = add_exactly(tl.sum(share * p, axis=1), prob, prob_low)
        log_p = tl.sum(shared(share, log_p), axis=1)
        log_prob, log_low = add_exactly(log_p, log_prob, log_low)
        total, total_low = add_exactly(tl.sum(share, axis=1), total, total_low)
    total += total_low
    return (prob + prob_low) / total, (log_prob + log_low) / total, total


@triton.jit
def sum_shares(
    row_ptrs, rows, n_classes, stride, COLUMNS: tl.constexpr, target_ptrs, target_stride,
    weight_ptr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The maximum and sum of each row as `max_and_sum`, its scores, and the sum of its shares."""
    top = tl.full(rows.shape, float("-inf"), ACC)
    total = tl.zeros(rows.shape, ACC)
    prob = tl.zeros(rows.shape, ACC)
    log_prob = tl.zeros(rows.shape, ACC)
    whole = tl.zeros(rows.shape, ACC)
    total_low = tl.zeros(rows.shape, ACC)
    prob_low = tl.zeros(rows.shape, ACC)
    log_low = tl.zeros(rows.shape, ACC)
    whole_low = tl.zeros(rows.shape, ACC)
    for start in range(0, n_classes, BLOCK_CLASSES):
        c = start + tl.arange(0, BLOCK_CLASSES)
        mask = rows[:, None] & (c < n_classes)[None, :]
        ptrs = row_ptrs[:, None] + class_places(c, stride, COLUMNS)[None, :]
        x = widen(tl.load(ptrs, mask=mask, other=float("-inf")), ACC)
        t = read_targets(target_ptrs, c, target_stride, mask, ACC)
        share = class_weights(weight_ptr, c, n_classes, ACC) * t
        new_top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp(top - shift)
        before = tl.where(top == float("-inf"), 0.0, top)
        below = x - shift[:, None]
        e = tl.exp(below)
        total, total_low = add_exactly(tl.sum(e, axis=1), total * factor, total_low * factor)
        p = tl.sum(share * e, axis=1)
        prob, prob_low = add_exactly(p, prob * factor, prob_low * factor)
        log_p = shared(whole + whole_low, before - shift) + tl.sum(shared(share, below), axis=1)
        log_prob, log_low = add_exactly(log_p, log_prob, log_low)
        whole, whole_low = add_exactly(tl.sum(share, axis=1), whole, whole_low)
        top = new_top
    total, prob, log_prob, whole = (
        total + total_low, prob + prob_low, log_prob + log_low, whole + whole_low,
    )  # fmt: skip
    # Without a class that can be, softmax is 0 / 0.
    log_total = tl.where(top == float("-inf"), float("nan"), tl.log(total))
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, total, prob / total / whole, log_prob / whole - log_total, whole


@triton.jit
def index_weights(label, used, ignore_index, weight_ptr, n_classes):
    """How much rows with these class indices count, float64; NaN if there is no such class."""
    used = used & (label != ignore_index)
    if weight_ptr is None:
        found = used.to(tl.float64)
    else:
        possible = (label >= 0) & (label < n_classes)
        known = tl.load(weight_ptr + label, mask=used & possible, other=float("nan"))
        found = tl.where(used, known, 0.0)
    return found


@triton.jit
def score_tile(
    row_ptrs, rows, n_classes, stride, COLUMNS: tl.constexpr, KIND: tl.constexpr, target_ptrs,
    target_stride, weight_ptr, pos_weight_ptr, ignore_index, ACC: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The rows' maximum, sum of exponentials (of shares, with LABELS), p, ln p, and weight."""
    if KIND == INDICES:
        label = tl.load(target_ptrs, mask=rows, other=0)
        weight = index_weights(label, rows, ignore_index, weight_ptr, n_classes)
        used = weight != 0.0
        top, total = max_and_sum(row_ptrs, used, n_classes, stride, COLUMNS, ACC, BLOCK_CLASSES)
        x = true_logit(row_ptrs, used, label, n_classes, stride, COLUMNS, ACC) - top
        prob = tl.exp(x) / total
        log_prob = x - tl.log(total)
    elif KIND == SHARES:
        top, total, prob, log_prob, whole = sum_shares(
            row_ptrs, rows, n_classes, stride, COLUMNS, target_ptrs, target_stride, weight_ptr,
            ACC, BLOCK_CLASSES,
        )  # fmt: skip
        weight = tl.where(rows, whole, 0.0).to(tl.float64)
    else:
        prob, log_prob, total = sum_labels(
            row_ptrs, rows, n_classes, stride, COLUMNS, target_ptrs, target_stride, weight_ptr,
            pos_weight_ptr, ACC, BLOCK_CLASSES,
        )  # fmt: skip
        top = total
        weight = rows.to(tl.float64)
    used = weight != 0.0
    return top, total, tl.where(used, prob, 0.0), tl.where(used, log_prob, 0.0), weight
