"""Sum of two tensors, the second one scaled."""

from __future__ import annotations

from torch import Tensor


def scaled_sum(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """See `mmfuse.ops.scaled_sum`."""
    return a + factor * b
