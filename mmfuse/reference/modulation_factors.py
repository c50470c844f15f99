"""The decision of OGM, OGM-GE and MLB for each gradient: ratios, coefficients, noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._example import Normal
from .discrepancy_ratios import discrepancy_ratios

#: The formulas; the operators take the place of one.
TPAMI, CVPR, MLB = 0, 1, 2


def modulation_factors(
    scores: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    m2: Tensor | None,
    alpha: float,
    beta: float,
    formula: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modulation_factors`; the noise's [T] are [0] without statistics."""
    wide = WIDE[scores.device.type]
    if formula == MLB:
        ratios, coefficients = _behind(scores.to(wide), alpha, beta)
    else:
        ratios, coefficients = _ahead(scores.to(wide), alpha, formula)
    ratios, coefficients = ratios.to(scores.dtype), coefficients.to(scores.dtype)
    scale = coefficients[owner]
    if m2 is None or numel is None:
        return ratios, coefficients, scale, scale.new_empty(0)
    std = (m2.to(wide) / (numel - 1).clamp(min=1)).sqrt() + eps
    noise_std = torch.where(numel > 1, std, 0.0)
    return ratios, coefficients, scale.to(m2.dtype), noise_std.to(m2.dtype)


def _ahead(scores: Tensor, alpha: float, formula: int) -> tuple[Tensor, Tensor]:
    """OGM's, which slows a modality that is ahead."""
    ratios = discrepancy_ratios(scores)
    if formula == CVPR:
        x = torch.where(ratios > 1, alpha * ratios, 0.0)
        slowed = 1 - torch.tanh(x)
    else:
        x = ratios - 1
        slowed = (1 - alpha * torch.tanh(x)).clamp(min=0)
    # NaN is not greater than 0, nor is alpha * inf for alpha = 0.
    return ratios, torch.where(x > 0, slowed, 1.0)


def _behind(scores: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """MLB's, which also speeds up one that is behind."""
    others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    mean = torch.where(others, scores, 0.0).sum(1) / (len(scores) - 1)
    ratios = mean / scores
    change = torch.tanh(alpha * (ratios - 1))
    k = 1 + torch.where(ratios > 1, (beta - 1) * change, change)
    return ratios, torch.where(k.isnan(), 1.0, k)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    scores = normal(2).sigmoid()
    owner = torch.tensor([1, 0, 1], device=scores.device)
    return {
        "modulation_factors": (scores, owner, owner + 5, normal(3).exp(), 0.8, 2.0, TPAMI, 1e-8)
    }
