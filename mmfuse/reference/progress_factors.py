"""CGGM's decision: how large a part of all progress the other modalities have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._example import Normal

#: Added to sums of progress, as the authors do; in csrc/common/progress.h as well.
EPS = 1e-8


def progress_factors(
    scores: Tensor,
    last_scores: Tensor,
    last_shares: Tensor,
    owner: Tensor,
    rho: float,
    bound: float,
    wide_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.progress_factors`; a `bound` of infinity is none."""
    wide = WIDE[scores.device.type]
    count, paired = len(last_scores), scores.dim() == 2
    table, before = scores.to(wide), last_scores.to(wide)
    if paired:
        change = table - before
    else:
        table = table.unsqueeze(1).expand(count, count)
        change = table - before.diagonal().unsqueeze(1)
    progress = change.diagonal()
    itself = torch.eye(count, dtype=torch.bool, device=scores.device)
    compared = ~(change.isnan() | change.T.isnan() | itself)
    # A sum of the others, not a difference from the whole, which would cancel.
    others = torch.where(compared, change, 0.0).sum(0)
    number = compared.sum(1)
    mine = torch.where(compared, change, 0.0).sum(1) / number if paired else progress
    shares = ((others + EPS) / (others + mine + EPS)).clamp(-bound, bound)
    shares = shares.masked_fill(number == 0, torch.nan)
    coefficients = torch.where(shares.isnan(), 1.0, rho * shares).to(last_scores.dtype)
    kept_scores = torch.where(table.isnan(), before, table).to(last_scores.dtype)
    kept_shares = torch.where(shares.isnan(), last_shares.to(wide), shares).to(last_scores.dtype)
    scale = coefficients[owner].to(wide if wide_scale else torch.float32)
    progress, shares = (x.to(last_scores.dtype, copy=True) for x in (progress, shares))
    return coefficients, progress, shares, scale, kept_scores, kept_shares


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    scores, last = normal(3).sigmoid(), normal(3, 3).sigmoid()
    owner = torch.tensor([0, 2, 1, 1], device=scores.device)
    return {"progress_factors": (scores, last, normal(3), owner, 1.3, 2.0, False)}
