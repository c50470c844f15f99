"""OPM's rule: how likely a modality is dropped. `mmfuse.methods.opm` has the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._numbers import finite, real
from ..loop.result import Result
from ..ops._tensors import check_named

if TYPE_CHECKING:
    from .opm import OPM


@dataclass(frozen=True)
class OPMResult(Result):
    """The features that are left, and why; nothing here has waited for the device.

    Attributes:
        features: Name → the feature, zero where it was dropped; one that a sample lacks passes as
            it is.
        keep: [M, B] bool, in the order of `features`; False where it was dropped and, in training,
            where the sample lacks the modality.
        drop_probability: [M] q_m that this step has used.
        scores: [M] S_m of this step, batch mean of the true class's probability; None in `eval()`.
        ratios: [M] rho_m of this step; None in `eval()`.
        rows: Indices of the samples that are left; None if all are. `OPM.official` removes some.
    """

    features: dict[str, Tensor]
    keep: Tensor
    drop_probability: Tensor
    scores: Tensor | None
    ratios: Tensor | None
    rows: Tensor | None = None


def drop_probabilities(ratios: Tensor, q_base: float = 0.5, lam: float = 0.5) -> Tensor:
    """q_m = min(1, q_base·(1 + λ·tanh(ρ_m − 1))) for ρ_m > 1, else 0 (TPAMI 2024).

    Args:
        ratios: [M] discrepancy ratios ρ_m.
        q_base: Probability at ρ just above 1, in [0, 1].
        lam: λ ≥ 0, how much it rises with ρ.

    Returns:
        [M] in [0, 1]; 0 where ρ is NaN.
    """
    check_named([ratios], lambda _: "ratios")
    q_base, lam = real("q_base", q_base), real("lam", lam)
    q = (q_base * (1 + lam * torch.tanh(ratios - 1))).clamp(max=1)
    return torch.where(ratios > 1, q, 0.0)


class Given(NamedTuple):
    """One batch that a rule drops from, in the order of the modalities."""

    names: list[str]
    features: list[Tensor]
    logits: list[Tensor]
    labels: Tensor | None
    scores: Tensor
    present: Tensor | None = None


def with_one_left(
    given: Given, dropped: Sequence[Tensor], keep: Tensor, q: Tensor, scale: Tensor | None
) -> OPMResult:
    """The result where modalities are missing: a sample keeps the last feature that it has.

    If a sample would lose all that it has, the feature with the smallest q_m stays. A missing
    modality counts as not kept.

    Args:
        given: The batch.
        dropped: Its features, dropped and multiplied by `scale`.
        keep: [M, B] bool, which are left.
        q: [M] the probabilities.
        scale: 0-d factor on what is left, or None.
    """
    assert given.present is not None
    present = given.present
    lost = present.any(0) & ~(keep & present).any(0)
    least = torch.where(present, q.unsqueeze(1), torch.inf).argmin(0)
    itself = torch.arange(len(present), device=present.device).unsqueeze(1)
    saved = lost & (least == itself)
    features = {}
    for m, (name, x) in enumerate(zip(given.names, dropped, strict=True)):
        whole = given.features[m] if scale is None else given.features[m] * scale
        rows = saved[m].view(-1, *[1] * (x.dim() - 1))
        features[name] = torch.where(rows, whole.to(x.dtype), x)
    return OPMResult(features, (keep | saved) & present, q, None, None)


@dataclass(frozen=True)
class OPMRule:
    """The rule of the paper."""

    q_base: float = 0.5
    lam: float = 0.5

    #: True if the probability is that of the same step, not that of the step before.
    same_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= real("q_base", self.q_base) <= 1:
            raise ValueError(f"q_base must be a probability in [0, 1], got {self.q_base}")
        if not (finite("lam", self.lam) and self.lam >= 0):
            raise ValueError(f"lam must be a finite number of at least 0, got {self.lam}")

    def drop(self, opm: OPM, given: Given, q: Tensor) -> OPMResult:
        """Drops with probability q; `OPM` fills in scores and ratios."""
        return opm.drop(given, q)
