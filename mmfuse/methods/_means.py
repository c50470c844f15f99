"""Means over the other modalities."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_others(values: Tensor, here: Tensor | None = None) -> Tensor:
    """Mean over the first dimension without the entry itself: [M, …] to [M, …].

    Args:
        values: [M, …].
        here: [M] or [M, …] bool, which entries others are compared with; NaN where there is none.
            None for all.
    """
    count = len(values)
    if here is not None:
        itself = torch.eye(count, dtype=torch.bool, device=here.device)
        others = here.unsqueeze(0) & ~itself.view(count, count, *[1] * (here.dim() - 1))
        return mean_where(others, values.unsqueeze(0), 1)
    if count == 2:
        return values.flip(0)
    # Sums without the entry, not a difference from the whole sum, which would cancel.
    others = 1 - torch.eye(count, dtype=values.dtype, device=values.device)
    sums: Tensor = (others @ values.reshape(count, -1)).view_as(values)
    return sums / (count - 1)


def mean_where(here: Tensor, values: Tensor, dim: int) -> Tensor:
    """Mean over `dim` of the values that are here, NaN if none is; others may hold anything."""
    here = here.view(*here.shape, *[1] * (values.dim() - here.dim()))
    return torch.where(here, values, 0.0).sum(dim) / here.sum(dim)
