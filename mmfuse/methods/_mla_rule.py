"""MLA's equations, of the paper and of the releases, and its fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import finite, whole
from ..loop.given import check_present
from ..ops._tensors import FLOATING
from ..ops.logit_divergence import logit_divergence


class MLAFusion(NamedTuple):
    """Predictions of all modalities together.

    Attributes:
        logits: [B, C].
        weights: [M, B] of each modality in each sample, in the order of the logits.
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
        """Of the k kᵀ that P loses: a number."""
        return a + r @ k

    def moved(self, projector: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """P [D, D] after this turn's features, whose mean is r [D], and its length to divide by."""
        k = projector @ r
        # Each pass over [D, D] costs as much as a product with a vector.
        smaller = torch.addcdiv(projector, torch.outer(k, k), self.divisor(k, r, a), value=-1)
        return smaller, torch.linalg.matrix_norm(smaller)

    def confidences(self, logits: list[Tensor], backend: str | None) -> Tensor:
        """[M, B] −H, but for a constant: KL of softmax z_m and all classes alike."""
        alike = [torch.zeros_like(z) for z in logits]
        return logit_divergence(logits, alike, per_row=True, backend=backend)


@dataclass(frozen=True)
class MLAReleased(MLARule):
    """With the release's division by each entry of a + k r, a matrix; and its entropies."""

    def divisor(self, k: Tensor, r: Tensor, a: Tensor) -> Tensor:
        """A matrix."""
        return torch.outer(k, r).add_(a)

    def confidences(self, logits: list[Tensor], backend: str | None) -> Tensor:
        """[M, B] −H; NaN where a probability is 0."""
        shares = [z.softmax(1) for z in logits]
        return torch.stack([(p * p.log()).sum(1) for p in shares])


@dataclass(frozen=True)
class MLALatest(MLAReleased):
    """The latest release, which never finds the weight that it looks for."""

    def moved(self, projector: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """P as it is, the identity."""
        return projector, torch.ones_like(a)


def fused(
    rule: MLARule,
    logits: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None,
    backend: str | None,
) -> MLAFusion:
    """`MLA.fuse`, with all checks."""
    if not isinstance(logits, Mapping):
        raise TypeError(f"logits must map names to tensors, got {type(logits).__name__}")
    if len(logits) < 2:
        raise ValueError(f"logits must hold at least two modalities, got {list(logits)}")
    names, each = list(logits), list(logits.values())
    for name, z in logits.items():
        if not isinstance(z, Tensor) or z.dtype not in FLOATING:
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"logits[{name!r}] must be a floating tensor [B, C], got {kind}")
        if z.dim() != 2 or z.shape != each[0].shape:
            raise ValueError(
                f"logits[{name!r}] must be [B, C], of one shape for all, got {list(z.shape)}"
            )
    sure = rule.confidences(each, backend)
    stacked = torch.stack(each)
    if present is not None:
        mask = check_present(names, present, stacked.shape[1], stacked.device)
        sure = sure.masked_fill(~mask, -torch.inf)
        stacked = torch.where(mask.unsqueeze(2), stacked, 0)
    weights = sure.softmax(0)
    return MLAFusion((weights.unsqueeze(2).to(stacked) * stacked).sum(0), weights)
