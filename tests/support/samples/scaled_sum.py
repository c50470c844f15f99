"""scaled_sum: both dtypes, more elements than a block has, and none."""

from __future__ import annotations

from collections.abc import Sequence

import tolerances
import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import WIDE, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 5, 3, device=device)
    k = torch.tensor(0.5, device=device)
    nothing = (a[:0], b[:0], k)
    return {"scaled_sum": [(a, b, k), (a.double(), b.double(), k.double()), nothing]}


def _bound(arguments: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    a, b, factor = (x.double() for x in arguments)
    zero = torch.zeros(())
    dtype = arguments[0].dtype
    return [
        tolerances.updated_grad(dtype, exact[0], a.abs() + (factor * b).abs(), zero, zero, zero)
    ]


bounds = {"scaled_sum": _bound}


def small(device: str) -> Small:
    a, b = torch.randn(2, 5, 3, device=device)
    k = torch.tensor(0.5, device=device)
    return lambda: ops.scaled_sum(a, b, k)


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 1,024 elements."""
    written = []
    for dtype in WIDE:
        a, b = (inputs.normal(1024 + 47, dtype=dtype, offset=1) for _ in "ab")
        written.append(ops.scaled_sum(a, b, inputs.vector(0.7, dtype=dtype)[0]))
    return written
