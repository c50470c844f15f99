"""ARM's rule: each modality's contribution and weight. `mmfuse.methods.arm` has the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..loop.result import Result
from ..ops.joint_entropies import MAX_BINS, check_bins
from ._arm_information import Complete, normalised_information
from ._means import mean_of_others

# Below it a contribution is none: its weight would be next to infinite, or negative.
_LEAST = 1e-6


@dataclass(frozen=True)
class ARMResult(Result):
    """Scores and decision of one step; nothing here has waited for the device.

    Attributes:
        features: Name → the feature times its weight.
        weights: [M] float64, in the order of `features`.
        scores: [M] p_m, batch mean of the true class's probability; None where the weights are the
            average of those of training.
        contributions: [M] P_m; None likewise.
        nmi: [M] nmi_m; None likewise.
        ncmi: [M] ncmi_m; None likewise.
    """

    features: dict[str, Tensor]
    weights: Tensor
    scores: Tensor | None = None
    contributions: Tensor | None = None
    nmi: Tensor | None = None
    ncmi: Tensor | None = None


@dataclass(frozen=True)
class ARMRule:
    """The rule of the paper."""

    bins: int = 30
    conditional_bins: int = 2

    #: True if `eval()` takes the moving average of the weights of training.
    averages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bins(self.bins, MAX_BINS[2])
        check_bins(self.conditional_bins, MAX_BINS[3], name="conditional_bins")

    def information(
        self,
        rows: Sequence[Tensor],
        backend: str | None = None,
        complete: Complete | None = None,
    ) -> tuple[Tensor, Tensor]:
        """nmi_m and ncmi_m; [M, P] each, from M + 1 tensors [P, N] of which c is the last."""
        return normalised_information(
            rows, self.bins, self.conditional_bins, complete=complete, backend=backend
        )

    def weights(
        self, contributions: Tensor, average: Tensor, here: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[M] positive weights, and 0-d whether they count.

        If a modality contributes nothing, as one whose features are all alike, the weights of
        this batch say nothing, and those of the batches before are taken. `here` are the modalities
        that are compared; None for all.
        """
        counts = ~(contributions < _LEAST).any()
        own = modality_weights(contributions.clamp(min=_LEAST), here)
        return torch.where(counts, own, average), counts


def modality_contributions(
    nmi: Tensor,
    ncmi: Tensor,
    scores: Tensor,
    fused_score: Tensor,
    here: Tensor | None = None,
) -> Tensor:
    """P_m = p_c·nmi_m + (mean over j ≠ m of p_j)·(nmi_m − ncmi_m).

    Args:
        nmi: [M, …].
        ncmi: [M, …].
        scores: [M, …] probability of the true class, from each modality alone.
        fused_score: […] the same from the fused representation.
        here: [M] bool, the modalities j that there are; None for all.

    Returns:
        [M, …]; may be negative. NaN for a modality without any other.
    """
    found: Tensor = fused_score * nmi + mean_of_others(scores, here) * (nmi - ncmi)
    return found


def modality_weights(contributions: Tensor, here: Tensor | None = None) -> Tensor:
    """Mean over j ≠ m of P_j / P_m, over those that are here: [M] to [M]."""
    return mean_of_others(contributions, here) / contributions


def weighted(features: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Name → the feature times its weight."""
    pairs = zip(features.items(), weights.unbind(), strict=True)
    return {name: feature * factor.to(feature.dtype) for (name, feature), factor in pairs}
