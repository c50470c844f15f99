"""redundancy_ratio: more elements than a block has, at any address."""

from __future__ import annotations

from collections.abc import Sequence

import tolerances
import torch
from torch import Tensor

from mmfuse import ops
from mmfuse.reference.redundancy_ratio import EPS

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    k = torch.tensor(0.5, device=device)
    leaves = [t.clone().requires_grad_() for t in (a, b, k)]
    return {"redundancy_ratio": [(a, b, k), (*leaves,), (a.half(), b.half(), k)]}


def undefined(device: str) -> Samples:
    nothing = torch.empty(0, 3, device=device)
    return {"redundancy_ratio": [(nothing, nothing, torch.tensor(0.5, device=device))]}


def _bound(arguments: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    z1, _, input_sq = arguments
    dtype, divisor = tolerances.accumulation_dtype(z1.dtype), input_sq.detach().cpu().double() + EPS
    return [tolerances.redundancy(dtype, exact[0], z1.numel(), divisor)]


bounds = {"redundancy_ratio": _bound}


def small(device: str) -> Small:
    z1, z2 = torch.randn(2, 9, 33, device=device)
    input_sq = torch.tensor(0.5, device=device)
    return lambda: ops.redundancy_ratio(z1, z2, input_sq)


def short(device: str) -> Small:
    z1, z2 = torch.randn(2, 65, 512, device=device)
    input_sq = torch.tensor(0.5, device=device)
    return lambda: ops.redundancy_ratio(z1, z2, input_sq)


def case(inputs: Inputs) -> list[Tensor]:
    """A block has 2,048 elements."""
    written: list[Tensor] = []
    input_sq = inputs.vector(0.5)[0]
    for dtype in DTYPES:
        for offset in (0, 1):
            z1, z2 = (
                inputs.normal(2 * 2048 + 47, dtype=dtype, offset=offset).requires_grad_()
                for _ in "12"
            )
            ratio = ops.redundancy_ratio(z1, z2, input_sq)
            written += [ratio, *torch.autograd.grad(ratio, (z1, z2))]
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, offset in ((f32, 0), (bf16, 0), (f64, 0), (f16, 1)):
        z1, z2 = (inputs.normal(47, dtype=dtype, offset=offset) for _ in "12")
        ops.redundancy_ratio(z1, z2, inputs.vector(0.5)[0])
