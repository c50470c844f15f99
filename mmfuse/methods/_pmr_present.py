"""PMR where samples lack modalities: the comparison of modalities, and their losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..loop.given import pair_scores
from ..loop.ranks import Observed
from ..ops.modality_scores import ModalityScores, named_scores
from ..ops.sample_scores import named_sample_scores
from ._pmr_prototypes import IGNORED
from ._pmr_rule import similarities

#: Distances of each modality, their scores over its own samples, and [M, B] bool, which these are.
Seen = tuple[dict[str, Tensor], ModalityScores, Tensor]


def look_at_present(
    names: Sequence[str],
    features: Sequence[Tensor],
    labels: Tensor,
    mask: Tensor,
    prototypes: Sequence[Tensor],
    masks: bool,
    backend: str | None,
) -> tuple[Seen, Observed]:
    """Observations of the samples that have a modality; the others' values are not looked at.

    Args:
        names: The modalities.
        features: [B, …] of each.
        labels: [B] class indices.
        mask: [M, B] bool, which modalities each sample has.
        prototypes: [C, D] of each modality.
        masks: As in `similarities`.
        backend: Name of a backend; None for the best one.

    Returns:
        The distances, their scores and which rows count; and S_m as a table.
    """
    logits, counted = {}, []
    for name, feature, rows, each in zip(names, features, mask, prototypes, strict=True):
        here = ~each.isnan().any(1)
        possible = (labels >= 0) & (labels < len(each))
        place = torch.where(possible, labels, 0).long()
        # A label that is out of range stays, for the scores to refuse.
        rows = rows & (labels != IGNORED) & (~possible | here[place])
        # Selected, so that neither a NaN nor a gradient passes where there is nothing.
        shape = (-1, *[1] * (feature.dim() - 1))
        logits[name], _ = similarities(
            name, torch.where(rows.view(shape), feature, 0.0), each, masks
        )
        counted.append(rows)
    called = [f"prototype_logits[{name!r}]" for name in names]
    own = [
        named_scores([what], [z], torch.where(rows, labels, IGNORED), backend)
        for what, z, rows in zip(called, logits.values(), counted, strict=True)
    ]
    prob, log_prob = (torch.cat(each) for each in zip(*(one[:2] for one in own), strict=True))
    scores = ModalityScores(prob, log_prob, torch.stack([one.count for one in own]))
    shown = torch.stack(counted)
    rows = torch.where(shown.any(0), labels, IGNORED)
    samples = named_sample_scores(called, [z.detach() for z in logits.values()], rows, backend)
    table = pair_scores(samples, shown)
    return (logits, scores, shown), Observed(table.prob, table.count, paired=True)
