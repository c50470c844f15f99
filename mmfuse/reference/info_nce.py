"""The InfoNCE bound, from the whole matrix of similarities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal


def info_nce(a: Tensor, b: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.info_nce`; also log-sum-exp of the rows and of the columns."""
    similarity = _similarity(a, b, temperature)
    rows, columns = similarity.logsumexp(1), similarity.logsumexp(0)
    bound = (similarity.diagonal() - (rows + columns) / 2).mean() + math.log(len(a))
    return bound, rows, columns


def info_nce_backward(
    grad: Tensor, a: Tensor, b: Tensor, temperature: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the temperature."""
    similarity = _similarity(a, b, temperature)
    softmaxes = (similarity - rows[:, None]).exp() + (similarity - columns).exp()
    slope = torch.eye(len(a), dtype=softmaxes.dtype, device=a.device) - softmaxes / 2
    slope = slope * (grad / len(a))
    grad_a = (slope @ b.to(slope.dtype)) / temperature
    grad_b = (slope.T @ a.to(slope.dtype)) / temperature
    grad_temperature = -(slope * similarity).sum() / temperature
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_temperature


def _similarity(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    dtype = accumulator(a)
    return (a.to(dtype) @ b.to(dtype).T) / temperature


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    a, b, temperature = normal(5, 7), normal(5, 7), normal(1)[0].exp()
    s = a @ b.T / temperature
    sums = s.logsumexp(1), s.logsumexp(0)
    return {
        "info_nce": (a, b, temperature),
        "info_nce_backward": (normal(1)[0], a, b, temperature, *sums),
    }
