"""MLA's equations, of the paper and of the releases, and its fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import finite, whole
from ..loop.given import Loss, check_criterion, check_present
from ..loop.predictions import (
    check_alike,
    flat_distributions,
    is_multilabel,
    mean_where,
    present_only,
)
from ..loop.ranks import Observed
from ..ops.logit_divergence import logit_divergence


class MLAFusion(NamedTuple):
    """Predictions of all modalities together.

    Attributes:
        logits: As those of each modality.
        weights: [M, B] of each modality in each sample, in the order of the logits; [M, B, d1, …]
            with places; 0 for a modality that a sample does not have.
    """

    logits: Tensor
    weights: Tensor


@dataclass(frozen=True)
class MLARule:
    """The equations above."""

    alpha: float = 0.1
    batches: int | None = None

    def __post_init__(self) -> None:
        if not (finite("alpha", self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a positive finite number, got {self.alpha}")
        if self.batches is not None:
            whole("batches", self.batches, least=1)

    def regularisation(self, turns: Tensor, modalities: int) -> Tensor:
        """The number a in this turn, 0-d."""
        exponent = torch.ones_like(turns, dtype=WIDE[turns.device.type])
        if self.batches is not None:
            exponent += (turns // modalities % self.batches).to(exponent) / self.batches
        return torch.pow(self.alpha, exponent)

    def divisor(self, k: Tensor, r: Tensor, a: Tensor) -> Tensor:
        """The divisor of the k kᵀ that P loses: a number."""
        return a + r @ k

    def moved(self, projector: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """P [D, D] after this turn's features, whose mean is r [D], and its length to divide by."""
        k = projector @ r
        # Each pass over [D, D] costs as much as a product with a vector.
        smaller = torch.addcdiv(projector, torch.outer(k, k), self.divisor(k, r, a), value=-1)
        return smaller, torch.linalg.matrix_norm(smaller)

    def confidences(self, logits: list[Tensor], backend: str | None) -> Tensor:
        """[M, N] −H of logits [N, C], but for a constant: KL of softmax z_m and equal shares."""
        alike = [torch.zeros_like(z) for z in logits]
        return logit_divergence(logits, alike, per_row=True, backend=backend)


@dataclass(frozen=True)
class MLAReleased(MLARule):
    """The first release: a division by each entry of a + k r, a matrix; and its entropies."""

    def divisor(self, k: Tensor, r: Tensor, a: Tensor) -> Tensor:
        """A matrix."""
        return torch.outer(k, r).add_(a)

    def confidences(self, logits: list[Tensor], backend: str | None) -> Tensor:
        """[M, N] −H; NaN where a probability is 0."""
        shares = [z.softmax(1) for z in logits]
        return torch.stack([(p * p.log()).sum(1) for p in shares])


@dataclass(frozen=True)
class MLALatest(MLAReleased):
    """The latest release, which never finds the weight that it looks for."""

    def moved(self, projector: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """P as it is, the identity."""
        return projector, torch.ones_like(a)


def observed(
    features: Tensor, mask: Tensor | None, grad: Tensor | None, dtype: torch.dtype
) -> Observed:
    """The mean feature r of this rank, and whether its gradient holds something else than numbers.

    Args:
        features: [B, …, D].
        mask: [B] bool, which samples have the modality; None if all have.
        grad: Of the head's weight; None if there is none.
        dtype: Of r.
    """
    wide, rows = WIDE[features.device.type], features.detach().flatten(0, -2).to(dtype)
    wrong = torch.zeros(1, dtype=wide, device=rows.device)
    if grad is not None:
        wrong = (~grad.isfinite()).any().to(wide).reshape(1)
    if mask is None:
        count = torch.full((), len(rows), dtype=wide, device=rows.device)
        return Observed(rows.mean(0), count, wrong)
    here = mask.view(-1, *[1] * (features.dim() - 2)).expand(features.shape[:-1]).flatten()
    return Observed(mean_where(rows.T, here), here.sum().to(wide), wrong)


def may_be_empty(mask: Tensor | None) -> bool:
    """True if no sample has the modality, or where looking would wait for the device."""
    if mask is None or torch.compiler.is_dynamo_compiling():
        return mask is not None
    return mask.device.type != "cpu" or not bool(mask.any())


def fused(
    rule: MLARule,
    logits: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None,
    criterion: Loss,
    backend: str | None,
) -> MLAFusion:
    """`MLA.fuse`, with all checks."""
    if not isinstance(logits, Mapping):
        raise TypeError(f"logits must map names to tensors, got {type(logits).__name__}")
    if len(logits) < 2:
        raise ValueError(f"logits must hold at least two modalities, got {list(logits)}")
    names, each = list(logits), list(logits.values())
    multilabel = is_multilabel(check_criterion(criterion))
    check_alike(names, each, multilabel)
    mask = None
    if present is not None:
        mask = check_present(names, present, len(each[0]), each[0].device)
        each = present_only(each, mask)
    sure = rule.confidences([flat_distributions(z, multilabel) for z in each], backend)
    stacked = torch.stack(each)
    if multilabel:  # of all outputs together
        sure = sure.view(*stacked.shape[:2], -1).sum(2)
    elif stacked.dim() > 3:  # of each place
        sure = sure.view(*stacked.shape[:2], *stacked.shape[3:])
    if mask is None:
        weights = sure.softmax(0)
    else:
        here = mask.view(*mask.shape, *[1] * (sure.dim() - 2))
        weights = sure.masked_fill(~here, -torch.inf).softmax(0)
        weights = torch.where(here, weights, 0)  # of a sample without any they are NaN
    if multilabel:
        shares = weights.view(*weights.shape, *[1] * (stacked.dim() - 2))
    else:
        shares = weights.unsqueeze(2)
    return MLAFusion((shares.to(stacked) * stacked).sum(0), weights)
