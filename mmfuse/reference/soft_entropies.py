"""Entropies of a soft histogram over the values' own ranges, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._example import Normal
from .soft_histogram import soft_histogram, soft_histogram_backward


def soft_entropies(x: Tensor, y: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[P, 3] H(x), H(y), H(x, y); the histogram [P, bins, bins]; both ranges [P, 2]."""
    x_range, y_range = value_range(x), value_range(y)
    weights = soft_histogram(x, y, x_range, y_range, bins)
    p = weights / x.shape[1]
    least = torch.finfo(p.dtype).tiny

    def entropy(q: Tensor) -> Tensor:
        return -(q * q.clamp(min=least).log()).flatten(1).sum(1)

    entropies = torch.stack([entropy(p.sum(2)), entropy(p.sum(1)), entropy(p)], dim=1)
    return entropies, weights, x_range, y_range


def soft_entropies_backward(
    grad: Tensor, x: Tensor, y: Tensor, weights: Tensor, x_range: Tensor, y_range: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y; those of the ranges' ends are shared by the values that are there."""
    p = weights / x.shape[1]
    least = torch.finfo(p.dtype).tiny

    def slope(q: Tensor) -> Tensor:
        # Of -q log max(q, least): an empty cell has a finite slope.
        return -(q.clamp(min=least).log() + (q >= least))

    g_x, g_y, g_xy = (g[:, None, None] for g in (grad / x.shape[1]).unbind(1))
    table = g_x * slope(p.sum(2))[:, :, None] + g_y * slope(p.sum(1))[:, None] + g_xy * slope(p)
    grad_x, grad_y, grad_x_range, grad_y_range = soft_histogram_backward(
        table, x, y, x_range, y_range, weights.shape[1]
    )
    for out, values, range_, of_range in (
        (grad_x, x, x_range, grad_x_range),
        (grad_y, y, y_range, grad_y_range),
    ):
        for end in (0, 1):
            # The upper end of a constant row is above all values, and moves with them.
            place = values == range_[:, end : end + 1]
            place |= ~place.any(1, keepdim=True) & (values == range_[:, :1])
            share = of_range[:, end : end + 1] / place.sum(1, keepdim=True).clamp(min=1)
            out += torch.where(place, share, 0.0)
    return grad_x, grad_y


def value_range(x: Tensor) -> Tensor:
    """[P, 2] ends of each row's range; constant rows are at the first of the bins' centres.

    In the middle of a widened range they would lie between two centres, for an even number of bins,
    and have the entropy ln 2 of two values.
    """
    low, high = torch.aminmax(x, dim=1)
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
