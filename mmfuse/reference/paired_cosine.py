"""Mean cosine of row pairs, without the product of all rows with all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal

# The norm at which torch.nn.functional.normalize stops dividing.
MIN_NORM = 1e-12


def row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """[B] cosine of a_i and b_i."""
    dtype = accumulator(a, b)
    a, b = a.to(dtype), b.to(dtype)
    norms = [x.square().sum(dim=1).sqrt().clamp(min=MIN_NORM) for x in (a, b)]
    return (a * b).sum(dim=1) / (norms[0] * norms[1])


def paired_cosine(a: Tensor, b: Tensor) -> Tensor:
    """See `mmfuse.ops.paired_cosine`."""
    return row_cosines(a, b).mean()


def paired_cosine_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Grad / B · (b̂_i − cos_i â_i) / ‖a_i‖, and the same with a and b swapped."""
    dtype = accumulator(a, b)
    cosines = row_cosines(a, b).unsqueeze(1)
    norms = [x.to(dtype).square().sum(dim=1, keepdim=True).sqrt() for x in (a, b)]
    units = [x.to(dtype) / n.clamp(min=MIN_NORM) for x, n in zip((a, b), norms, strict=True)]
    scale = grad.to(dtype) / a.shape[0]
    out = []
    for x, unit, other, norm in zip((a, b), units, reversed(units), norms, strict=True):
        slope = scale * (other - cosines * unit) / norm.clamp(min=MIN_NORM)
        out.append(torch.where(norm <= MIN_NORM, 0.0, slope).to(x.dtype))
    return out[0], out[1]


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    a, b = normal(5, 7), normal(5, 7)
    return {"paired_cosine": (a, b), "paired_cosine_backward": (normal(1)[0], a, b)}
