"""Normalised information of each variable and one more, alone and given each of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ._example import Normal
from .joint_entropies import joint_entropies


def normalised(twice_mi: Tensor, total: Tensor) -> Tensor:
    """2·I/(sum of both entropies), in [0, 1]; 0 where both entropies are. NaN stays.

    An entropy of 0 comes out of its sum as a few rounding errors, and the quotient of two such
    would be anything. A single sample in another bin makes (1 + log N)/N, which is far more.
    """
    least = 256 * torch.finfo(total.dtype).eps
    return (twice_mi / (total + (total <= least))).clamp(0, 1)


def shared_information(
    data: Sequence[Tensor], bins: int, conditional_bins: int
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.shared_information`; the last of `data` is the target c."""
    c = len(data) - 1
    pairs = [k for m in range(c) for k in (m, c)]
    h_m, h_c, h_mc = joint_entropies(data, pairs, 2, bins)[0].unbind(-1)
    nmi = normalised(2 * (h_m + h_c - h_mc), h_m + h_c)
    ncmi = nmi.new_empty(c, *nmi.shape)
    for m in range(c):
        ncmi[m, m] = 0 * nmi[m]  # or NaN
    for m, j in combinations(range(c), 2):
        found = joint_entropies(data, [m, j, c], 3, conditional_bins)[0]
        h_m, h_j, h_mj, _, h_mc, h_jc, h_mjc = found[0].unbind(-1)
        ncmi[m, j] = normalised(2 * (h_mj + h_jc - h_mjc - h_j), h_mj + h_jc - 2 * h_j)
        ncmi[j, m] = normalised(2 * (h_mj + h_mc - h_mjc - h_m), h_mj + h_mc - 2 * h_m)
    return nmi, ncmi


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    return {"shared_information": ([normal(2, 37) for _ in range(3)], 5, 2)}
