"""PMR's rule: how much each modality is drawn to its prototypes; see `mmfuse.methods.pmr`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._numbers import finite, real
from ..loop.result import Result


@dataclass(frozen=True)
class PMRResult(Result):
    """The loss that was added, and why; nothing here has waited for the device.

    Attributes:
        loss: 0-d, to be added to the joint loss.
        coefficients: [M] k_m, how much each modality is drawn; 0 where nothing is done.
        scores: [M] S_m over all ranks, NaN for a modality that no sample has; None in `eval()`, as
            all that follows.
        ratios: [M] rho_m; NaN for a modality that shares samples with no other.
        prototype_losses: [M] PCE_m of this rank's samples.
        entropies: [M] H_m of them; None where they are not added.
        prototype_logits: Name → [B, C], the negative distances; of no meaning for a sample without
            the modality.
    """

    loss: Tensor
    coefficients: Tensor
    scores: Tensor | None = None
    ratios: Tensor | None = None
    prototype_losses: Tensor | None = None
    entropies: Tensor | None = None
    prototype_logits: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class PMRRule:
    """The paper's equations."""

    alpha: float = 1.0
    mu: float = 0.01
    momentum: float = 0.2

    #: True if a class without a sample has no part; else it makes everything NaN.
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("mu", self.mu)):
            if not (finite(name, value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= real("momentum", self.momentum) <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")

    def coefficients(self, behind: Tensor) -> Tensor:
        """k_m."""
        return (behind - 1).clamp(0, 1)

    def weights(self, coefficients: Tensor) -> Tensor:
        """The factor of each PCE_m."""
        return self.alpha * coefficients

    def prototype(self, old: Tensor, new: Tensor, first: bool) -> Tensor:
        """The next prototypes, from class means that are NaN for a class without a sample."""
        moved = self.momentum * old + (1 - self.momentum) * new
        return torch.where(new.isnan(), old, torch.where(old.isnan(), new, moved))


@dataclass(frozen=True)
class PMRReleased(PMRRule):
    """The rule of the released code."""

    mu: float = 0.0

    masks: ClassVar[bool] = False

    def coefficients(self, behind: Tensor) -> Tensor:
        """α for a modality that is behind, whatever the distance."""
        return torch.where(behind > 1, self.alpha, 0.0).to(behind)

    def weights(self, coefficients: Tensor) -> Tensor:
        """α is in them."""
        return coefficients

    def prototype(self, old: Tensor, new: Tensor, first: bool) -> Tensor:
        """NaN for a class without a sample, and for ever."""
        return new if first else self.momentum * old + (1 - self.momentum) * new


def prototype_ratios(scores: Tensor) -> tuple[Tensor, Tensor]:
    """How far each modality is ahead of the last of the others, and behind the first of them.

    Args:
        scores: [M] S_m, or a table of them (see `mmfuse.loop.pairs`). A NaN is compared with
            nobody.

    Returns:
        [M] each: S_m over the smallest other, and the largest other over S_m; above 1 for a
        modality ahead of some, and for one behind some. NaN without another to compare with.
    """
    table = scores / scores.T if scores.dim() == 2 else scores.unsqueeze(1) / scores
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    table = table.masked_fill(itself | table.isnan(), -torch.inf)
    ahead, behind = table.amax(1), table.amax(0)
    return ahead.masked_fill(ahead < 0, torch.nan), behind.masked_fill(behind < 0, torch.nan)


def similarities(
    name: str, feature: Tensor, prototypes: Tensor, masks: bool
) -> tuple[Tensor, Tensor]:
    """Negative distances [B, C] of a modality's features from its prototypes, and which exist [C].

    Args:
        name: Of the modality.
        feature: [B, …].
        prototypes: [C, D].
        masks: True if a class without a prototype gets −inf; else NaN.

    Raises:
        ValueError: the feature has another number of values than a prototype.
    """
    x = feature.flatten(1)
    if x.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features[{name!r}] has {x.shape[1]} values a sample, the prototypes have "
            f"{prototypes.shape[1]}"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, prototypes.dtype), torch.float32)
    here = ~prototypes.isnan().any(1)
    if masks:  # a NaN would be in the gradient also behind a mask
        prototypes = torch.where(here.unsqueeze(1), prototypes, 0.0)
    # Not by |x|² − 2xc + |c|², which cancels near a prototype.
    exact = "donot_use_mm_for_euclid_dist"
    logits = -torch.cdist(x.to(dtype), prototypes.to(dtype), compute_mode=exact)
    return (logits.masked_fill(~here, -torch.inf) if masks else logits), here


def mean_entropy(logits: Tensor, counted: Tensor) -> Tensor:
    """0-d mean entropy of the rows that count, 0 if none does.

    Args:
        logits: [B, C]; −inf for a class that has no part.
        counted: [B] bool.
    """
    log_p = logits.log_softmax(1)
    log_p = torch.where(log_p > -torch.inf, log_p, 0.0)
    each = -(torch.where(logits > -torch.inf, log_p.exp(), 0.0) * log_p).sum(1)
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1)


def check_labels(labels: object, rows: int) -> None:
    """Checks that labels are class indices, one for each sample.

    Raises:
        TypeError: they are no integer tensor.
        ValueError: there are more or fewer than samples.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {kind}: a prototype is the "
            "mean of a class; of soft labels take labels.argmax(1), and for several labels or a "
            "regression another method, with criterion= or scores="
        )
    if labels.shape != (rows,):
        raise ValueError(
            f"labels must have shape [{rows}], got {list(labels.shape)}; of features [B, D, d1, …] "
            "give each place as a sample: features.movedim(1, -1).flatten(0, -2), labels.flatten()"
        )
