"""scaled_sum: the sum of two tensors, the second one scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import Op


def _fake(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(a)


_op = Op("scaled_sum", "(Tensor a, Tensor b, Tensor factor) -> Tensor", _fake)


def scaled_sum(a: Tensor, b: Tensor, factor: Tensor, *, backend: str | None = None) -> Tensor:
    """A + factor·b. Not differentiable.

    Equivalent to ``a + factor * b``.

    Args:
        a: Of any shape, float32 or float64.
        b: Like `a`.
        factor: 0-d, of the dtype of `a`.
        backend: Name of a backend; None for the best one.

    Returns:
        Like `a`.

    Raises:
        TypeError: a tensor is not float32 or float64, or not of the dtype of `a`.
        ValueError: `b` has another shape than `a`, or `factor` is not 0-d.
    """
    if a.dtype not in (torch.float32, torch.float64) or not a.dtype == b.dtype == factor.dtype:
        raise TypeError("a, b and factor must be of one dtype, float32 or float64")
    if a.shape != b.shape or factor.dim():
        raise ValueError("a and b must have one shape, and factor none")
    tensors = (a.detach().contiguous(), b.detach().contiguous(), factor.detach())
    result: Tensor = _op(backend, a.device, *tensors)
    return result
