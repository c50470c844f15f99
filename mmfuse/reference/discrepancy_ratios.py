"""Discrepancy ratio of each modality: the mean of S_m / S_j over the others."""

from __future__ import annotations

import torch
from torch import Tensor


def discrepancy_ratios(scores: Tensor) -> Tensor:
    """See `mmfuse.ops.discrepancy_ratios`."""
    count = scores.numel()
    pairwise = scores.unsqueeze(1) / scores.unsqueeze(0)
    others = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    return torch.where(others, pairwise, 0.0).sum(dim=1) / (count - 1)
