"""ARM as its authors' released code has it; `mmfuse.ARM.official` says how it differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..reference.shared_information import normalised
from ._arm_information import Complete, histograms, mean_over_others, nmi_terms, released_ncmi
from ._arm_rule import ARMRule, modality_weights


@dataclass(frozen=True)
class ARMReleased(ARMRule):
    """The rule of the released code."""

    averages: ClassVar[bool] = False

    def information(
        self,
        rows: Sequence[Tensor],
        backend: str | None = None,
        complete: Complete | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Nmi as in the paper, and ncmi as `released_ncmi` has it."""
        pairs, triples, others = histograms(
            rows, self.bins, self.conditional_bins, backend, complete
        )
        n = triples.counts.unflatten(-1, [self.conditional_bins] * 3)
        forth = released_ncmi(n.permute(0, 1, 2, 4, 3))
        back = released_ncmi(n.permute(0, 1, 3, 4, 2))
        nmi = normalised(*nmi_terms(pairs).unbind(-1))
        return nmi, mean_over_others(others, forth, back, complete)

    def weights(
        self, contributions: Tensor, average: Tensor, here: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[M], of either sign, or infinite; they always count."""
        return modality_weights(contributions, here), contributions.new_ones((), dtype=torch.bool)
