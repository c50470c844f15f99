"""The numbers that ARL compares, of one rank's samples: entropies, magnitudes and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._devices import WIDE
from ..loop.given import Loss, check_present, criterion_of, pair_means
from ..loop.predictions import check_alike, distributions, is_multilabel
from ..loop.ranks import Observed
from ..ops._criterion import PLAIN
from ..ops.sample_scores import named_sample_scores


def look_at(
    names: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor | None,
    present: Mapping[str, Tensor] | None,
    rows: int,
    criterion: Loss,
    backend: str | None,
) -> Observed:
    """Means over the samples of each modality, or tables of them (see `mmfuse.loop.pairs`).

    Args:
        names: The modalities.
        logits: Of each.
        labels: Their targets; None for no scores.
        present: Name → [B] bool, which samples have the modality; None if all have all.
        rows: How many samples there are.
        criterion: The loss that logits and targets are for.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: an input has an unsupported type.
        ValueError: shapes or labels do not fit.
    """
    for name, z in zip(names, logits, strict=True):  # those of other sizes are compared, too
        check_alike([name], [z], is_multilabel(criterion), rows)
    device = logits[0].device
    mask = None if present is None else check_present(names, present, rows, device)
    found, weight = _samples(names, logits, labels, criterion, backend)
    wide = weight.to(WIDE[device.type])
    if mask is not None:
        tables, count = pair_means(found, wide, mask)
        return Observed(torch.cat(tables), count, paired=True)
    # Selected, not multiplied with 0: what does not count may be NaN.
    means = [
        torch.where(wide > 0, each * wide, 0.0).flatten(1).sum(1) / wide.sum() for each in found
    ]
    return Observed(torch.cat(means), wide.sum())


def _samples(
    names: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor | None,
    criterion: Loss,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    """[M, B, …] entropies, magnitudes and, of labels, probabilities; how much each row counts.

    Entropies and magnitudes need no labels: where there are no class indices, zeros stand in.
    """
    called, how = [f"logits[{name!r}]" for name in names], criterion_of(criterion)
    if is_multilabel(criterion):  # each output's own, added up
        each = [distributions(z, multilabel=True).transpose(1, 2) for z in logits]
        indices = False
    else:
        each = list(logits)
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        indices = labels is not None and not labels.is_floating_point()
    first = each[0]
    some = labels if indices else first.new_zeros(first[:, 0].shape, dtype=torch.int64)
    assert some is not None
    found = named_sample_scores(
        called, each, some, backend, how if indices else PLAIN, statistics=True
    )
    assert found.entropy is not None and found.abs_sum is not None
    rows, weight = [found.entropy, found.abs_sum], found.weight
    if is_multilabel(criterion):
        rows, weight = [x.sum(2) for x in rows], weight[:, 0]
    if labels is None:
        return rows, weight
    told = found if indices else named_sample_scores(called, logits, labels, backend, how)
    if told.prob.dim() > rows[0].dim():  # one for each place, of [B, L, d1, …]
        prob, counts = told.prob.flatten(2).mean(2), weight
    else:
        prob, counts = told.prob, told.weight
    return [*rows, prob], counts
