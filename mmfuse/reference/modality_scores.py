"""How sure each modality is of the target: of each row, on average, and the means' gradient.

Logits are [N, C] or [N, C, D]; a row is one (n, d). The targets are class indices [N] or [N, D],
or floating, of the logits' shape: probabilities of the classes, or yes and no for each label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._dtype import accumulator
from ._example import Normal

IGNORED_LABEL = -100


def _along_classes(values: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C] or [1, C, 1]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _in_range(targets: Tensor) -> Tensor:
    """The targets, NaN where they lie outside of [0, 1]."""
    return targets.masked_fill(~((targets >= 0) & (targets <= 1)), torch.nan)


def _row_weights(
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
    dtype: torch.dtype,
) -> Tensor:
    """How much each row counts: w of its class, sum of w t, or 1 with many labels."""
    wide = WIDE[labels.device.type]
    if multilabel:
        return torch.ones_like(labels.select(1, 0), dtype=wide)
    if labels.is_floating_point():
        # As `_shares` has them: targets of -1 and 1 add up to 0, but such a row is to be NaN.
        shares = _in_range(labels.to(dtype)).to(wide)
        return (shares if weight is None else shares * _along_classes(weight, shares)).sum(1)
    counts = labels != ignore_index
    if weight is None:
        return counts.to(wide)
    possible = (labels >= 0) & (labels < len(weight))
    found = weight[labels.clamp(0, len(weight) - 1)].masked_fill(~possible, torch.nan)
    return torch.where(counts, found, 0.0)


def _true_class(log_softmax: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's log p, NaN where the label is impossible, and the labels as indices."""
    classes = log_softmax.shape[1]
    possible = (labels >= 0) & (labels < classes)
    index = labels.clamp(0, max(classes - 1, 0)).unsqueeze(1)
    log_p = log_softmax.gather(1, index).squeeze(1)
    return log_p.masked_fill(~possible, torch.nan), index


def _shares(labels: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W t of each class."""
    shares = _in_range(labels.to(dtype))
    return shares if weight is None else shares * _along_classes(weight.to(dtype), shares)


def _log_likelihoods(z: Tensor, y: Tensor) -> Tensor:
    """Each label's y log sigmoid(z) + (1 - y) log(1 - sigmoid(z)), with 0 * inf = 0."""
    against = torch.where(y == 0, 0.0, y * (-z).clamp(min=0))
    against = against + torch.where(y == 1, 0.0, (1 - y) * z.clamp(min=0))
    return -(against + (-z.abs()).exp().log1p())


def _label_shares(
    y: Tensor, weight: Tensor | None, pos_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Each label's share of its row's score; the shares of a row sum to 1."""
    # An impossible label makes its row NaN, also if it has no weight.
    shares = torch.where(y.isnan(), y, 1.0)
    if pos_weight is not None:
        shares = _along_classes(pos_weight.to(dtype), y) * y + (1 - y)
    if weight is not None:
        shares = shares * _along_classes(weight.to(dtype), y)
    return shares / shares.sum(1, keepdim=True)


def _row_scores(
    z: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    multilabel: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """P and log p of each row."""
    if multilabel:
        y = _in_range(labels.to(dtype))
        log_p = _log_likelihoods(z.to(dtype), y)
        shares = _label_shares(y, weight, pos_weight, dtype)
        return (shares * log_p.exp()).sum(1), torch.where(shares == 0, 0.0, shares * log_p).sum(1)
    log_softmax = torch.log_softmax(z.to(dtype), dim=1)
    if labels.is_floating_point():
        shares = _shares(labels, weight, dtype)
        total = shares.sum(1)
        log_prob = torch.where(shares == 0, 0.0, shares * log_softmax).sum(1)
        return (shares * log_softmax.exp()).sum(1) / total, log_prob / total
    log_p, _ = _true_class(log_softmax, labels)
    return log_p.exp(), log_p


def sample_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    multilabel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.sample_scores`."""
    dtype = accumulator(*logits)
    rows = _row_weights(labels, weight, ignore_index, multilabel, dtype)
    probs, log_probs = [], []
    for z in logits:
        prob, log_prob = _row_scores(z, labels, weight, pos_weight, multilabel, dtype)
        probs.append(torch.where(rows != 0, prob, 0.0))
        log_probs.append(torch.where(rows != 0, log_prob, 0.0))
    return torch.stack(probs), torch.stack(log_probs), rows


def sample_statistics(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    multilabel: bool = False,
) -> tuple[Tensor, ...]:
    """`sample_scores` of class indices, and of each row what `statistics=True` adds there."""
    dtype = accumulator(*logits)
    scores = sample_scores(logits, labels, weight, pos_weight, ignore_index, multilabel)
    rows = scores[2]
    correct, numbers = [], []
    for z in logits:
        z = z.to(dtype)
        log_p = z.log_softmax(1)
        p, undefined = log_p.exp(), log_p.isnan().any(1)
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(1)
        correct.append((z.argmax(1) == labels) & ~undefined & (rows != 0))
        log_sum_exp = z.logsumexp(1).masked_fill(undefined, torch.nan)
        each = torch.stack([entropy, log_sum_exp, z.abs().sum(1)])
        numbers.append(torch.where(rows != 0, each, 0.0))
    return *scores, torch.stack(correct), *(torch.stack(x) for x in zip(*numbers, strict=True))


def _means(each: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """Means of what each modality has, 0 where a row does not count, by the rows' weights."""
    return torch.stack([(rows.to(x.dtype) * x).sum() / count for x in each]).to(each.dtype)


def modality_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    multilabel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modality_scores`."""
    prob, log_prob, rows = sample_scores(
        logits, labels, weight, pos_weight, ignore_index, multilabel
    )
    count = rows.sum()
    return _means(prob, rows, count), _means(log_prob, rows, count), count


def modality_accuracies(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    multilabel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modality_accuracies`."""
    found = sample_statistics(logits, labels, weight, pos_weight, ignore_index, multilabel)
    prob, _, rows, correct, *_ = found
    count = rows.sum()
    return _means(correct.to(rows), rows, count), _means(prob.to(rows), rows, count), count


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
    """Gradient of both scores; for a class, (grad_prob p + grad_log_prob) w / n (onehot - p)."""
    grads = []
    for m, z in enumerate(logits):
        dtype = accumulator(z)
        rows = _row_weights(labels, weight, ignore_index, multilabel, dtype)
        slopes = grad_prob[m].to(dtype), grad_log_prob[m].to(dtype)
        if multilabel:
            y = _in_range(labels.to(dtype))
            shares = _label_shares(y, weight, pos_weight, dtype)
            s = _log_likelihoods(z.to(dtype), y).exp()
            grad = (slopes[0] * s + slopes[1]) / count * shares * (y - z.to(dtype).sigmoid())
        else:
            log_softmax = torch.log_softmax(z.to(dtype), dim=1)
            softmax = log_softmax.exp()
            if labels.is_floating_point():
                shares = _shares(labels, weight, dtype)
                inner = (shares * softmax).sum(1, keepdim=True)
                total = shares.sum(1, keepdim=True)
                grad = slopes[0] * softmax * (shares - inner)
                grad = (grad + slopes[1] * (shares - softmax * total)) / count
            else:
                log_p, index = _true_class(log_softmax, labels)
                onehot = torch.zeros_like(softmax).scatter_(1, index, 1.0)
                factor = (slopes[0] * log_p.exp() + slopes[1]) / count
                if weight is not None:
                    factor = factor * rows.to(dtype)
                grad = factor.unsqueeze(1) * (onehot - softmax)
        grad = torch.where(rows.unsqueeze(1) != 0, grad, 0.0).to(z.dtype)
        grads.append(torch.empty_like(z).copy_(grad))
    return grads


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    logits = [normal(5, 3), normal(5, 7)]
    labels = torch.tensor([0, 2, IGNORED_LABEL, 1, 0], device=logits[0].device)
    usual = logits, labels, None, None, IGNORED_LABEL, False
    count = modality_scores(*usual)[2]
    return {
        "modality_accuracies": usual,
        "modality_scores": usual,
        "modality_scores_backward": (normal(2), normal(2), count, *usual),
        "sample_scores": usual,
        "sample_statistics": usual,
    }
