"""How far two representations are apart, relative to their inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._dtype import accumulator
from ._example import Normal

EPS = 1e-12


def redundancy_ratio(z1: Tensor, z2: Tensor, input_sq: Tensor) -> Tensor:
    """See `mmfuse.ops.redundancy_ratio`."""
    dtype = accumulator(z1)
    return (z1.to(dtype) - z2.to(dtype)).square().mean() / (input_sq.to(dtype) + EPS)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    return {"redundancy_ratio": (normal(5, 7), normal(5, 7), normal(1)[0].exp())}
