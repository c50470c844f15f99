"""LFM's two terms for any task, also where samples lack modalities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ..loop.given import Loss, check_present
from ..loop.losses import CROSS_ENTROPY, loss_of_present
from ..loop.predictions import (
    check_alike,
    distributions,
    flat_distributions,
    is_multilabel,
    mean_where,
    present_only,
)

Named = Mapping[str, Tensor]
#: The logits, 0 where they are missing, and [M, B] bool, which are there; None for all.
Checked = tuple[list[Tensor], "Tensor | None"]
#: Makes [K] mixture divergences, or [K, B] with ``per_row=True``, of two lists of K logits [B, C].
Divergence = Callable[..., Tensor]


def checked(
    logits: Named, present: Named | None, multilabel: bool, compared: bool = True
) -> Checked:
    """The logits, 0 where they are missing, and [M, B] bool, which are there.

    Args:
        logits: Of each modality.
        present: Name → [B] bool, which samples have the modality; None if all have all.
        multilabel: As in `mmfuse.loop.predictions.distributions`.
        compared: True if there will be an alignment of them.

    Raises:
        TypeError: logits or masks have an unsupported type.
        ValueError: names or shapes do not fit.
    """
    names, each = list(logits), list(logits.values())
    check_alike(names, each, multilabel, compared=compared)
    if present is None:
        return each, None
    mask = check_present(names, present, len(each[0]), each[0].device)
    return present_only(each, mask), mask


def terms_of(
    criterion: Loss,
    each: list[Tensor],
    labels: Tensor,
    mask: Tensor | None,
    divergence: Divergence,
) -> tuple[Tensor, Tensor, Tensor]:
    """The joint logits z, their loss, and A.

    Args:
        criterion: The loss; None for ``nn.CrossEntropyLoss()``.
        each: Logits and masks, from `checked`.
        labels: As the criterion takes them.
        mask: From `checked`.
        divergence: Of the predictions of two modalities.
    """
    joint, loss = joint_of(each, mask), CROSS_ENTROPY if criterion is None else criterion
    counted = None
    of_places = labels.dim() > 1 and not labels.is_floating_point()
    if of_places and isinstance(loss, nn.CrossEntropyLoss):
        counted = (labels != loss.ignore_index).flatten(1)
    if mask is None:
        cross_entropy = loss(joint, labels)
    else:
        cross_entropy = loss_of_present(loss, joint, labels, mask.any(0))
    multilabel = is_multilabel(criterion)
    return joint, cross_entropy, gap_of(each, mask, counted, multilabel, divergence)


def joint_of(logits: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean of the logits of the modalities that a sample has; 0 if it has none.

    Args:
        logits: [B, …] of each modality; 0 where it is missing.
        mask: [M, B] bool, which modalities each sample has; None if all have all.
    """
    stacked = torch.stack(list(logits))
    if mask is None:
        return stacked.mean(0)
    count = mask.sum(0).clamp(min=1).view(-1, *[1] * (stacked.dim() - 2))
    return stacked.sum(0) / count


def gap_of(
    logits: Sequence[Tensor],
    mask: Tensor | None,
    counted: Tensor | None,
    multilabel: bool,
    divergence: Divergence,
) -> Tensor:
    """0-d alignment A: a mean over pairs of modalities, each over what both have.

    Args:
        logits: [B, …] of each modality.
        mask: [M, B] bool, which modalities each sample has; None if all have all.
        counted: [B, R] bool, which of a sample's R distributions count; None for all.
        multilabel: As in `mmfuse.loop.predictions.distributions`.
        divergence: Of the predictions of two modalities.
    """
    pairs = list(combinations(range(len(logits)), 2))
    if mask is None and counted is None:
        flat = [flat_distributions(z, multilabel) for z in logits]
        return divergence([flat[m] for m, _ in pairs], [flat[n] for _, n in pairs]).mean()
    each = [distributions(z, multilabel) for z in logits]
    of_sample = each[0].shape[1]
    first, second, rows = [], [], []
    for m, n in pairs:
        here = each[0].new_ones(each[0].shape[:2], dtype=torch.bool)
        if mask is not None:
            here = (mask[m] & mask[n]).unsqueeze(1).expand(-1, of_sample)
        rows.append(here if counted is None else here & counted)
        # Selected in both: of −inf in one and 0 in the other there would be no gradient but NaN.
        of_pair = [torch.where(rows[-1].unsqueeze(2), each[i], 0).flatten(0, 1) for i in (m, n)]
        first.append(of_pair[0])
        second.append(of_pair[1])
    shared = torch.stack(rows).flatten(1)
    found = mean_where(divergence(first, second, per_row=True), shared)
    return found.sum() / shared.any(1).sum().clamp(min=1)


def plain_divergence(first: list[Tensor], second: list[Tensor], *, per_row: bool = False) -> Tensor:
    """KL(mu‖p) / 2 + KL(mu‖q) / 2 in PyTorch, since the op has no second derivatives."""
    found = []
    for a, b in zip(first, second, strict=True):
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
        found.append((log_mean.exp() * (log_mean - (log_p + log_q) / 2)).sum(1))
    rows = torch.stack(found)
    return rows if per_row else rows.mean(1)
