"""The decision of OGM and OGM-GE for each gradient: discrepancy ratios, coefficients, noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._example import Normal
from .discrepancy_ratios import discrepancy_ratios


def modulation_factors(
    scores: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    m2: Tensor | None,
    alpha: float,
    cvpr: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modulation_factors`; the noise's [T] are [0] without statistics."""
    wide = WIDE[scores.device.type]
    ratios = discrepancy_ratios(scores.to(wide))
    if cvpr:
        x = torch.where(ratios > 1, alpha * ratios, 0.0)
        slowed = 1 - torch.tanh(x)
    else:
        x = ratios - 1
        slowed = (1 - alpha * torch.tanh(x)).clamp(min=0)
    # NaN is not greater than 0, nor is alpha * inf for alpha = 0.
    coefficients = torch.where(x > 0, slowed, 1.0)
    ratios, coefficients = ratios.to(scores.dtype), coefficients.to(scores.dtype)
    scale = coefficients[owner]
    if m2 is None or numel is None:
        return ratios, coefficients, scale, scale.new_empty(0)
    std = (m2.to(wide) / (numel - 1).clamp(min=1)).sqrt() + eps
    noise_std = torch.where(numel > 1, std, 0.0)
    return ratios, coefficients, scale.to(m2.dtype), noise_std.to(m2.dtype)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    scores = normal(2).sigmoid()
    owner = torch.tensor([1, 0, 1], device=scores.device)
    return {"modulation_factors": (scores, owner, owner + 5, normal(3).exp(), 0.8, False, 1e-8)}
