"""Discrepancy ratio of each modality: the mean of S_m / S_j over the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._example import Normal


def discrepancy_ratios(scores: Tensor) -> Tensor:
    """See `mmfuse.ops.discrepancy_ratios`."""
    count = scores.numel()
    pairwise = scores.unsqueeze(1) / scores.unsqueeze(0)
    others = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    return torch.where(others, pairwise, 0.0).sum(dim=1) / (count - 1)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    return {"discrepancy_ratios": (normal(3).exp(),)}
