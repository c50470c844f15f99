"""Means over the other modalities."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_others(values: Tensor) -> Tensor:
    """Mean over the first dimension without the entry itself: [M, …] to [M, …]."""
    count = len(values)
    if count == 2:
        return values.flip(0)
    # Sums without the entry, not a difference from the whole sum, which would cancel.
    others = 1 - torch.eye(count, dtype=values.dtype, device=values.device)
    sums: Tensor = (others @ values.reshape(count, -1)).view_as(values)
    return sums / (count - 1)
