"""Comparisons of modalities, each over the samples that both have.

A table [M, M] has in row m and column j the mean score of modality m over the samples that have m
and j, NaN where there are none. With all modalities in all samples its columns are alike, and what
is here is what the papers' formulas say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ranks import Observed


def own(table: Tensor) -> Tensor:
    """[M] each modality's score over all of its own samples; NaN for one that is missing."""
    return table.diagonal()


def missing(seen: Observed) -> Tensor:
    """[M] bool, the modalities that no sample has, or that the user's numbers leave out."""
    if seen.paired:
        return own(seen.count.view_as(seen.tables()[0])) == 0
    return seen.means.isnan()


def mean_ratio(table: Tensor) -> Tensor:
    """[M] mean over j ≠ m of S_m / S_j; NaN for a modality that shares no sample with another."""
    count = len(table)
    itself = torch.eye(count, dtype=torch.bool, device=table.device)
    compared = ~(table.isnan() | table.T.isnan() | itself)
    ratios = torch.where(compared, table / table.T, 0.0)
    return ratios.sum(1) / compared.sum(1)


def stages(
    seen: Observed, ratio: Callable[[Tensor], Tensor] = mean_ratio
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[M] scores, ratios and coefficients, as far as the user's numbers or tables give them.

    Args:
        seen: Means that are tables, or the user's ratios or coefficients.
        ratio: Makes ratios of a table of scores.

    Returns:
        The scores and the ratios, NaN where the user's numbers leave them out, and the user's
        coefficients; None for those that the method has to make of the ratios.
    """
    if seen.paired:
        table = seen.tables()[0]
        return own(table), ratio(table), None
    nothing = torch.full_like(seen.means, torch.nan)
    if seen.kind == "ratios":
        return nothing, seen.means, None
    return nothing, nothing, seen.means
