"""Entropies of a soft histogram over the values' own ranges, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._example import Normal
from .soft_histogram import soft_histogram, soft_histogram_backward


def soft_entropies(
    x: Tensor, y: Tensor, bins: int, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[P, 3] H(x), H(y), H(x, y); the histogram [P, bins, bins]; both ranges [P, 2].

    Only samples that are `present`, [P, N], count; without one the entropies and ranges are NaN.
    """
    x_range, y_range = value_range(x, present), value_range(y, present)
    weights = soft_histogram(x, y, x_range, y_range, bins, present)
    p = weights / _samples(x, present)
    least = torch.finfo(p.dtype).tiny

    def entropy(q: Tensor) -> Tensor:
        return -(q * q.clamp(min=least).log()).flatten(1).sum(1)

    entropies = torch.stack([entropy(p.sum(2)), entropy(p.sum(1)), entropy(p)], dim=1)
    return entropies, weights, x_range, y_range


def soft_entropies_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    x_range: Tensor,
    y_range: Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y; those of the ranges' ends are shared by the values that are there."""
    samples = _samples(x, present)
    p = weights / samples
    least = torch.finfo(p.dtype).tiny

    def slope(q: Tensor) -> Tensor:
        # The slope of -q log max(q, least): an empty cell has a finite one.
        return -(q.clamp(min=least).log() + (q >= least))

    g_x, g_y, g_xy = (g[:, None, None] / samples for g in grad.unbind(1))
    table = g_x * slope(p.sum(2))[:, :, None] + g_y * slope(p.sum(1))[:, None] + g_xy * slope(p)
    grad_x, grad_y, grad_x_range, grad_y_range = soft_histogram_backward(
        table, x, y, x_range, y_range, weights.shape[1], present
    )
    for out, values, range_, of_range in (
        (grad_x, x, x_range, grad_x_range),
        (grad_y, y, y_range, grad_y_range),
    ):
        for end in (0, 1):
            # The upper end of a constant row is above all values, and moves with them.
            place = values == range_[:, end : end + 1]
            if present is not None:
                place &= present
            at_low = values == range_[:, :1]
            place |= ~place.any(1, keepdim=True) & (at_low if present is None else at_low & present)
            share = of_range[:, end : end + 1] / place.sum(1, keepdim=True).clamp(min=1)
            out += torch.where(place, share, 0.0)
    return grad_x, grad_y


def _samples(x: Tensor, present: Tensor | None) -> Tensor | int:
    """How many count, of each problem: [P, 1, 1] of the values' type."""
    return x.shape[1] if present is None else present.sum(1).to(x.dtype)[:, None, None]


def value_range(x: Tensor, present: Tensor | None = None) -> Tensor:
    """[P, 2] ends of each row's range; constant rows are at the first of the bins' centres.

    In the middle of a widened range they would lie between two centres, for an even number of bins,
    and have the entropy ln 2 of two values.
    """
    if present is None:
        low, high = torch.aminmax(x, dim=1)
    else:
        low = torch.where(present, x, torch.inf).amin(1)
        high = torch.where(present, x, -torch.inf).amax(1)
        low, high = (torch.where(present.any(1), end, torch.nan) for end in (low, high))
    least = (low.abs() * (4 * torch.finfo(x.dtype).eps)).clamp(min=0.5)
    return torch.stack([low, high + torch.where(low == high, 2 * least, 0.0)], dim=1)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    x, y = normal(2, 37), normal(2, 37)
    _, *known = soft_entropies(x, y, 5)
    return {
        "soft_entropies": (x, y, 5),
        "soft_entropies_backward": (normal(2, 3), x, y, *known),
    }
