"""ARM where samples miss modalities, or the scores are the user's: which samples count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..loop.given import More, check_present, own_numbers
from ..loop.modalities import named_features
from ..ops import ModalityScores
from ._arm_information import Complete

#: The name of the fused representation's score among the user's.
FUSED = "fused"


def is_more(more: More) -> bool:
    """True if there is more than a batch whose samples have all modalities.

    Raises:
        TypeError: it is of no use to ARM.
    """
    for kind in ("ratios", "coefficients"):
        if more.get(kind) is not None:
            raise TypeError(
                f"ARM takes no {kind}: multiply the features by your own weights without ARM, or "
                "give scores"
            )
    return any(value is not None for value in more.values())


class Shown(NamedTuple):
    """The modalities of each sample of this rank, and the user's scores.

    Attributes:
        mask: [M, B] bool.
        own: [M + 1] scores of the user's own, that of the fused representation last, and their
            count; None if they are to be made of logits.
    """

    mask: Tensor
    own: ModalityScores | None

    def rows(self, here: Tensor) -> Tensor:
        """[B] bool, the samples that have all modalities that are here; [M] bool."""
        return (self.mask | ~here.unsqueeze(1)).all(0)

    def scores(self, here: Tensor) -> ModalityScores | None:
        """The user's; they do not count on a rank without a sample that has all modalities."""
        if self.own is None:
            return None
        count = self.own.count * self.rows(here).any()
        return self.own._replace(count=count)


def shown(
    features: Mapping[str, Tensor],
    modalities: int,
    logits: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    more: More,
) -> Shown:
    """Looks at masks or at scores of the user's own.

    Raises:
        TypeError: one of them has an unsupported type, or there are two things instead of one.
        ValueError: names, shapes or numbers do not fit.
    """
    names, values = named_features("ARM", features, modalities)
    rows, device = values[0].shape[0], values[0].device
    kind, numbers, count = own_numbers([*names, FUSED], device, more, logits)
    if kind is not None:
        mask = ~numbers[:-1].isnan().unsqueeze(1).expand(-1, rows)
        return Shown(mask, ModalityScores(numbers, numbers.log(), count))
    if isinstance(labels, Tensor) and labels.shape[:1] != (rows,):
        shape = list(labels.shape)
        raise ValueError(f"labels has shape {shape}, features[{names[0]!r}] has {rows} rows")
    return Shown(check_present(names, more.get("present") or {}, rows, device), None)


def complete(here: Tensor, rows: Tensor, values: Tensor) -> Complete:
    """The entries of values [B, …] that count, for the samples in `rows`."""
    of_each = rows.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return Complete(here.unsqueeze(1), of_each.reshape(1, -1))


def left_alone(
    weights: Tensor, counts: Tensor, here: Tensor, known: Tensor, average: Tensor
) -> tuple[Tensor, Tensor]:
    """[M] weights where samples miss modalities, and 0-d whether they count.

    A modality that no sample has weighs 1, and so does one that there is no other beside. If no
    sample has all the others, the batch says nothing. Averages are of weights relative to all M
    modalities, so that a batch without one of them does not enter.

    Args:
        weights: As the rule has them.
        counts: True if the rule counts them.
        here: [M] bool, the modalities that some sample has.
        known: 0-d bool, whether a sample has all of these.
        average: [M] the weights to take where a batch says nothing.
    """
    compared = here & (here.sum() > 1)
    weights = torch.where(compared, torch.where(known, weights, average), 1.0)
    return weights, counts & here.all() & known
