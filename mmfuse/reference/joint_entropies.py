"""Joint histograms with NumPy's bins, and the entropies of all their margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._dtype import accumulator
from ._example import Normal


def bin_edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """[P, bins + 1] edges of equal bins from low to high, [P] each, rounded as numpy.linspace does.

    Constant data are widened by 0.5 to either side, as numpy.histogram does.
    """
    half = torch.where(low == high, 0.5, 0.0).to(low.dtype)
    low, high = low - half, high + half
    width = (high - low).unsqueeze(1)
    # A tensor, because on a GPU division by a host's number is a product with its reciprocal.
    count = torch.full((), bins, dtype=low.dtype, device=low.device)
    step = width / count
    i = torch.arange(bins + 1, dtype=low.dtype, device=low.device)
    # Each product is rounded before it is added; a step that underflows is formed the other way.
    rises = torch.where(step == 0, (i / count) * width, i * step)
    edges = rises + low.unsqueeze(1)
    edges[:, -1] = high
    return edges


def bin_indices(data: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """[P, N] index of each value's bin, and [P] whether the row has a finite range."""
    data = data.to(accumulator(data))
    low, high = data.aminmax(dim=1)
    valid = (high - low).isfinite()
    low, high = (torch.where(valid, end, 0.0).to(data.dtype) for end in (low, high))
    edges = bin_edges(low, high, bins)
    inner = edges[:, 1:-1].contiguous()
    return torch.searchsorted(
        inner, torch.where(valid[:, None], data, 0.0).to(data), right=True
    ), valid


def joint_entropies(
    data: Sequence[Tensor], tuples: Sequence[int], order: int, bins: int
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.joint_entropies`."""
    indices, valid = zip(*(bin_indices(x, bins) for x in data), strict=True)
    counts = []
    for q in range(0, len(tuples), order):
        members = tuples[q : q + order]
        cells = torch.zeros_like(indices[0])
        for k in members:
            cells = cells * bins + indices[k]
        good = torch.stack([valid[k] for k in members]).all(0)
        hits = torch.zeros(len(cells), bins**order, dtype=torch.int64, device=cells.device)
        hits.scatter_add_(1, cells, good[:, None].expand_as(cells).to(torch.int64))
        counts.append(hits)
    stacked = torch.stack(counts)
    return entropies(stacked, order, bins), stacked


def entropies(counts: Tensor, order: int, bins: int) -> Tensor:
    """[Q, P, 2^order - 1] of `WIDE`: ln n - sum c ln c / n of the margin over the bits of k + 1."""
    wide = WIDE[counts.device.type]
    cube = counts.unflatten(-1, [bins] * order).to(wide)
    total = counts.sum(-1).to(wide)
    out = []
    for mask in range(1, 2**order):
        others = [2 + k for k in range(order) if not mask >> k & 1]
        margin = (cube.sum(others) if others else cube).flatten(2)
        out.append((total.log() - torch.special.xlogy(margin, margin).sum(-1) / total).clamp(min=0))
    return torch.stack(out, dim=-1)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    return {"joint_entropies": ([normal(2, 37), normal(2, 37)], [0, 1], 2, 5)}
