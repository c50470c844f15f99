"""Batch means of the true class's softmax probability and of its logarithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dtype import accumulator

IGNORED_LABEL = -100


def _true_class(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns log softmax [B, C] and each row's label, NaN rows where the label is impossible."""
    log_softmax = torch.log_softmax(logits.to(dtype), dim=1)
    classes = logits.shape[1]
    possible = (labels >= 0) & (labels < classes)
    log_softmax = log_softmax.masked_fill(~possible.unsqueeze(1), torch.nan)
    return log_softmax, labels.clamp(0, max(classes - 1, 0))


def modality_scores(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.modality_scores`."""
    dtype = accumulator(*logits)
    valid = labels != IGNORED_LABEL
    count = valid.sum()
    probs, log_probs = [], []
    for z in logits:
        log_softmax, index = _true_class(z, labels, dtype)
        log_p = log_softmax.gather(1, index.unsqueeze(1)).squeeze(1)
        log_p = torch.where(valid, log_p, 0.0)
        prob = torch.where(valid, log_p.exp(), 0.0)
        probs.append(prob.sum() / count)
        log_probs.append(log_p.sum() / count)
    return torch.stack(probs).to(dtype), torch.stack(log_probs).to(dtype)


def modality_scores_backward(
    grad_prob: Tensor, grad_log_prob: Tensor, logits: Sequence[Tensor], labels: Tensor
) -> list[Tensor]:
    """Gradient of both scores: (grad_prob p_i + grad_log_prob) / n * (onehot - softmax)."""
    valid = (labels != IGNORED_LABEL).unsqueeze(1)
    count = valid.sum()
    grads = []
    for m, z in enumerate(logits):
        dtype = accumulator(z)
        log_softmax, index = _true_class(z, labels, dtype)
        onehot = torch.zeros_like(log_softmax).scatter_(1, index.unsqueeze(1), 1.0)
        p = log_softmax.gather(1, index.unsqueeze(1)).exp()
        weight = (grad_prob[m].to(dtype) * p + grad_log_prob[m].to(dtype)) / count
        grad = weight * (onehot - log_softmax.exp())
        grads.append(torch.where(valid, grad, 0.0).to(z.dtype))
    return grads
