"""modality_accuracies: how many samples each modality gets right, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from ._arguments import check_sequence
from ._criterion import ARGUMENTS, PLAIN, Criterion, check_range, checked
from ._eager import Eager
from ._registry import Op


class ModalityAccuracies(NamedTuple):
    """Accuracies of M modalities; all float64 where the device has it.

    Attributes:
        accuracy: [M]; the share of the rows that count whose label is the argmax.
        prob: [M]; mean over the same rows of the label's probability.
        count: 0-d; the sum of the rows' weights, as in `ModalityScores`.
    """

    accuracy: Tensor
    prob: Tensor
    count: Tensor  # type: ignore[assignment]  # of a tuple, a method


def _fake(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    accuracy = labels.new_empty(len(logits), dtype=WIDE[labels.device.type])
    return accuracy, torch.empty_like(accuracy), accuracy.new_empty(())


_op = Op(
    "modality_accuracies",
    f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake,
    module="modality_scores",
)


def modality_accuracies(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> ModalityAccuracies:
    """Top-1 accuracy over the batch, per modality, and the mean probability of the label.

    These are the metric of CGGM (Guo et al., NeurIPS 2024) and the score of OGM-GE from one read of
    the logits. Not differentiable.

    Equivalent to, for each modality's logits z::

        rows = labels != ignore_index
        z, y = z.movedim(1, -1)[rows], labels[rows]
        w = torch.ones(len(y)) if weight is None else weight[y]
        p = z.softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
        (w * (z.argmax(-1) == y)).sum() / w.sum(), (w * p).sum() / w.sum(), w.sum()

    Of equal logits the first one is the argmax; where the softmax is NaN, none is.

    Args:
        logits: M tensors [N, C] or [N, C, d1, …], as in `modality_scores`.
        labels: [N, d1, …] integer class indices.
        weight: [C]; weights of the classes.
        ignore_index: Rows of this class index do not count.
        backend: Name of a backend; None for the best one.

    Returns:
        `ModalityAccuracies`. NaN where no row counts.

    Raises:
        TypeError: logits, labels or weight have an unsupported dtype or layout.
        ValueError: shapes do not match, labels are not class indices, or, on the CPU, a label is
            out of range; on other devices prob is NaN then, and the row counts as wrong.
    """
    if not isinstance(logits, (list, tuple)):
        check_sequence("logits", logits)
    names = [f"logits[{m}]" for m in range(len(logits))]
    return named_accuracies(names, logits, labels, backend, Criterion(weight, ignore_index))


def named_accuracies(
    names: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor,
    backend: str | None,
    criterion: Criterion = PLAIN,
) -> ModalityAccuracies:
    """`modality_accuracies`, with errors that call the logits by these names."""
    arguments = checked(names, logits, labels, criterion)
    if arguments[1].is_floating_point():
        raise ValueError(
            f"labels must be integer class indices, got {labels.dtype}: of probabilities take "
            "labels.argmax(1)"
        )
    accuracy, prob, count = _op(backend, labels.device, *arguments)
    compiled = type(backend) is not Eager and torch.compiler.is_compiling()
    # An impossible label has given NaN, also to the sum; to look at every one would cost more.
    if not compiled and labels.is_cpu and math.isnan(sum(prob.tolist())):
        check_range(names, logits, labels, criterion)
    return ModalityAccuracies(accuracy, prob, count)
