"""modality_scores: how sure each modality is of the target, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from ._arguments import check_sequence
from ._criterion import ARGUMENTS, PLAIN, Criterion, check_range, checked, class_indices
from ._eager import Eager
from ._registry import Op

__all__ = ["Criterion", "ModalityScores", "class_indices", "modality_scores", "named_scores"]


class ModalityScores(NamedTuple):
    """Scores of M modalities.

    Attributes:
        prob: [M]; mean over the rows that count of the target's probability.
        log_prob: [M]; mean of its logarithm, in nats.
        count: 0-d float64; the sum of the rows' weights, by which the means of several
            micro-batches are averaged: how many rows count, or the sum of w_y.
    """

    prob: Tensor
    log_prob: Tensor
    count: Tensor  # type: ignore[assignment]  # of a tuple, a method


def _fake(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = any(z.dtype == torch.float64 for z in logits)
    dtype = torch.float64 if wide else torch.float32
    prob = torch.empty(len(logits), dtype=dtype, device=labels.device)
    count = torch.empty((), dtype=WIDE[labels.device.type], device=labels.device)
    return prob, torch.empty_like(prob), count


def _fake_backward(
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
    return [torch.empty_like(z) for z in logits]


_op = Op("modality_scores", f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fake)
_backward_op = Op(
    "modality_scores_backward",
    f"(Tensor grad_prob, Tensor grad_log_prob, Tensor count, {ARGUMENTS}) -> Tensor[]",
    _fake_backward,
    module="modality_scores",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, labels, weight, pos_weight, *ctx.constants = inputs
    count = output[2]
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(count, labels, weight, pos_weight, *logits)


def _backward(backend: str, ctx: Any, grad_prob: Tensor, grad_log_prob: Tensor, _: Any) -> Any:
    count, labels, weight, pos_weight, *logits = ctx.saved_tensors
    both = grad_prob.contiguous(), grad_log_prob.contiguous()
    inputs = logits, labels, weight, pos_weight, *ctx.constants
    return _backward_op(backend, labels.device, *both, count, *inputs), *[None] * 5


_op.register_autograd(_backward, _setup_context)
_backward_op.register_no_second_derivative()


def modality_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    multilabel: bool = False,
    pos_weight: Tensor | None = None,
    backend: str | None = None,
) -> ModalityScores:
    """Batch means of the target's probability and of its logarithm, per modality.

    Outputs and targets are as in `F.cross_entropy`: logits [N, C] or [N, C, d1, …] with class
    indices [N, d1, …], or with floating probabilities of the logits' shape; or, with
    `multilabel=True`, as in `F.binary_cross_entropy_with_logits`.

    Equivalent to, for each modality's logits z and class indices labels::

        rows = labels != ignore_index
        log_p = z.log_softmax(1).movedim(1, -1)[rows]
        log_p = log_p.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        w = torch.ones_like(log_p) if weight is None else weight[labels[rows]]
        (w * log_p.exp()).sum() / w.sum(), (w * log_p).sum() / w.sum(), w.sum()

    with probabilities t as targets, and w = 1 for `weight=None`, to::

        t = t * w.view(-1, *[1] * (t.dim() - 2))
        (t * z.softmax(1)).sum() / t.sum(), (t * z.log_softmax(1)).sum() / t.sum(), t.sum()

    and with `multilabel=True` and targets y, where w and pos_weight are 1 if they are None, to::

        log_s = y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)
        a = w * (pos_weight * y + 1 - y)  # along dimension 1
        a = a / a.sum(1, keepdim=True)
        (a * log_s.exp()).sum(1).mean(), (a * log_s).sum(1).mean(), y.select(1, 0).numel()

    where a share of 0 counts nothing, though its logarithm be infinite. In most multi-label sets
    nearly all targets are 0, and so is what a modality is scored for; pos_weight is the remedy.

    prob is the score S_m of OGM-GE (Peng et al., CVPR 2022, Eq. 8) divided by the batch size, which
    leaves every ratio as it is; log_prob is the performance of InfoReg (CVPR 2025, Eq. 8).
    Differentiable in the logits, once.

    Args:
        logits: M tensors [N, C] or [N, C, d1, …]; float16, bfloat16, float32 or float64. Each is
            read where it lies if its classes are one by one in memory, as in channels_last or
            after transpose(1, 2) of [N, d, C], or if what follows the classes is, as in a
            contiguous tensor; others are copied. C may differ, with class indices. With
            `multilabel`, [N], [N, L] or [N, L, d1, …]: a single logit is the binary case.
        labels: [N, d1, …] integer class indices; int64 is read as it is. Or floating, of the
            logits' shape, from 0 to 1: probabilities of the classes, or targets of the labels.
        weight: [C]; weights of the classes or labels.
        ignore_index: Rows of this class index do not count; for class indices only.
        multilabel: Each output stands for a label of its own.
        pos_weight: [L]; weights of the labels' positive part, with `multilabel`.
        backend: Name of a backend; None for the best one.

    Returns:
        `ModalityScores`, float64 if some logits are, otherwise float32. NaN where no row counts.

    Raises:
        TypeError: logits, labels or weights have an unsupported dtype or layout.
        ValueError: shapes do not match, or, on the CPU, a target is out of range. On other devices
            looking would cost a synchronisation; the scores of that modality are NaN there.
    """
    if not isinstance(logits, (list, tuple)):
        check_sequence("logits", logits)
    names = [f"logits[{m}]" for m in range(len(logits))]
    criterion = PLAIN
    plain = type(ignore_index) is int and ignore_index == -100 and multilabel is False
    if not plain or weight is not None or pos_weight is not None:
        criterion = Criterion(weight, ignore_index, multilabel, pos_weight)
    return named_scores(names, logits, labels, backend, criterion)


def named_scores(
    names: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor,
    backend: str | None,
    criterion: Criterion = PLAIN,
) -> ModalityScores:
    """`modality_scores`, with errors that call the logits by these names."""
    arguments = checked(names, logits, labels, criterion)
    prob, log_prob, count = _op(backend, labels.device, *arguments)
    compiled = type(backend) is not Eager and torch.compiler.is_compiling()
    # An impossible target has given NaN, also to the sum; to look at every one would cost more.
    if not compiled and labels.is_cpu and math.isnan(sum(prob.tolist())):
        check_range(names, logits, labels, criterion)
    return ModalityScores(prob, log_prob, count)
