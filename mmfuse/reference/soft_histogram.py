"""Joint histogram in which every sample is shared out between neighbouring bins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal


def _position(x: Tensor, range_: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lower of both bins and the upper one's share, [P, N] each; bins per unit [P, 1]."""
    low, high = range_.to(accumulator(x)).unsqueeze(-1).unbind(1)
    width = high - low
    per_unit = torch.full_like(width, bins - 1) / width  # one rounding; number / tensor has two
    t = ((x.to(low.dtype) - low) * per_unit).clamp(0, bins - 1)
    lower = t.nan_to_num(0.0).to(torch.int64).clamp(max=bins - 2)
    return lower, t - lower, per_unit


def soft_histogram(
    x: Tensor,
    y: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    bins: int,
    present: Tensor | None = None,
) -> Tensor:
    """See `mmfuse.ops.soft_histogram`; of the samples that are `present`, [P, N]."""
    i, f, _ = _position(x, x_range, bins)
    j, g, _ = _position(y, y_range, bins)
    weights = torch.zeros(len(x), bins * bins, dtype=f.dtype, device=x.device)
    for di, share_x in ((0, 1 - f), (1, f)):
        for dj, share_y in ((0, 1 - g), (1, g)):
            share = share_x * share_y
            if present is not None:
                share = torch.where(present, share, 0.0)
            weights.scatter_add_(1, (i + di) * bins + (j + dj), share)
    # A value that is not finite leaves no range to speak of: the whole problem is NaN.
    lost = ~(f.isfinite() & g.isfinite())
    broken = (lost if present is None else lost & present).any(1, keepdim=True)
    return weights.masked_fill_(broken, torch.nan).view(-1, bins, bins)


def soft_histogram_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    bins: int,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y and of both ends of their ranges; 0 where a sample is not present."""
    i, f, x_per_unit = _position(x, x_range, bins)
    j, g, y_per_unit = _position(y, y_range, bins)
    flat = grad.to(f.dtype).flatten(1)

    def cell(di: int, dj: int) -> Tensor:
        return flat.gather(1, (i + di) * bins + (j + dj))

    by_f = (1 - g) * (cell(1, 0) - cell(0, 0)) + g * (cell(1, 1) - cell(0, 1))
    by_g = (1 - f) * (cell(0, 1) - cell(0, 0)) + f * (cell(1, 1) - cell(1, 0))
    out = []
    for source, range_, slope, share, lower, per_unit in (
        (x, x_range, by_f, f, i, x_per_unit),
        (y, y_range, by_g, g, j, y_per_unit),
    ):
        t = lower + share
        if present is not None:
            slope, t = (torch.where(present, v, 0.0) for v in (slope, t))
        width = (range_[:, 1] - range_[:, 0]).to(t.dtype)
        low = (slope * (t - (bins - 1))).sum(1) / width
        high = -(slope * t).sum(1) / width
        own = slope * per_unit
        if present is not None:  # no range, where none is, makes NaN of 0
            own = torch.where(present, own, 0.0)
        out.append((own.to(source.dtype), torch.stack([low, high], dim=1)))
    (grad_x, grad_x_range), (grad_y, grad_y_range) = out
    return grad_x, grad_y, grad_x_range, grad_y_range


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    x, y = normal(2, 37), normal(2, 37)
    ranges = [torch.stack(torch.aminmax(v, dim=1), 1) for v in (x, y)]
    return {
        "soft_histogram": (x, y, *ranges, 5),
        "soft_histogram_backward": (normal(2, 5, 5), x, y, *ranges, 5),
    }
