"""InfoReg's decision: by how much each modality is ahead, and how strongly it is held back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._example import Normal


def information_pull(
    scores: Tensor,
    count: Tensor | None,
    window_open: Tensor,
    steps: Tensor,
    owner: Tensor,
    beta: float,
    multipliers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.information_pull`; coefficients, gap, steps, scale and pull."""
    wide = WIDE[scores.device.type]
    s = scores.to(wide) if count is None else scores.to(wide) * count.to(wide)
    # In a table each pair is compared over the samples that both have; NaN, for none, is not > 0.
    table = s.dim() == 2
    differences = s - s.T if table else s.unsqueeze(1) - s.unsqueeze(0)
    behind = differences > 0
    gap = torch.where(behind, differences, 0.0).sum(1) / behind.sum(1).clamp(min=1)
    strength = torch.exp(beta * torch.tanh(gap))
    if multipliers is not None:
        strength = strength * multipliers.to(wide)
    alpha = torch.where(window_open & (gap > 0), strength, 0.0).to(scores.dtype)
    here = ~scores.diagonal().isnan() if table else torch.ones_like(window_open)
    pull = alpha[owner]
    return alpha, gap, steps + here, torch.ones_like(pull), pull


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    scores = -normal(3).exp()
    window = scores < -0.5, torch.arange(3, device=scores.device)
    owner = torch.tensor([0, 2, 1, 1], device=scores.device)
    return {"information_pull": (scores, None, *window, owner, 0.9, None)}
