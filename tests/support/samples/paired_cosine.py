"""paired_cosine: rows of a warp's length and of a block's, and of none."""

from __future__ import annotations

from collections.abc import Sequence

import tolerances
import torch
from cosines import rows_of
from torch import Tensor

from mmfuse import ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    a, b = torch.randn(2, 4, 3, device=device).unbind()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    k = torch.tensor(0.5, device=device)
    return {
        "paired_cosine": [(a, b), (*leaves,), (a[:, :0], b[:, :0])],
        "paired_cosine_backward": [(k, a, b), (k, a[:0], b[:0]), (k, a[:, :0], b[:, :0])],
    }


def undefined(device: str) -> Samples:
    nothing = torch.empty(0, 3, device=device)
    return {"paired_cosine": [(nothing, nothing)]}


def _bound(arguments: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    a, b = arguments
    rows, dtype = (
        rows_of(a, b),
        tolerances.accumulation_dtype(torch.promote_types(a.dtype, b.dtype)),
    )
    divisor = rows.norms[0] * rows.norms[1]
    return [tolerances.cosine(dtype, rows.cosines, rows.overlap, divisor, a.shape[1])]


def _backward_bound(arguments: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    grad, a, b = arguments
    rows = rows_of(a, b)
    return [
        tolerances.cosine_gradient(
            x.dtype,
            exact[k],
            grad.double().cpu() / len(a) / rows.norms[k],
            rows.units[k],
            rows.units[1 - k],
            rows.cosines,
            rows.overlap,
        )
        for k, x in enumerate((a, b))
    ]


bounds = {"paired_cosine": _bound, "paired_cosine_backward": _backward_bound}


def small(device: str) -> Small:
    a, b = torch.randn(2, 9, 33, device=device)
    return lambda: ops.paired_cosine(a, b)


def short(device: str) -> Small:
    a, b = torch.randn(2, 65, 512, device=device)
    a.requires_grad_()
    return lambda: torch.autograd.grad(ops.paired_cosine(a, b), a)


def case(inputs: Inputs) -> list[Tensor]:
    """A row belongs to a warp, or from 1,025 columns on to a block."""
    written: list[Tensor] = []
    for dtype in DTYPES:
        for columns, offset in ((40, 0), (33, 0), (47, 0), (40, 1), (1064, 0), (1061, 1), (1, 0)):
            rows = 3 if columns > 1000 or inputs.interpreted else 37
            a, b = (
                inputs.normal(rows, columns, dtype=dtype, offset=offset).requires_grad_()
                for _ in "ab"
            )
            cosine = ops.paired_cosine(a, b)
            written += [cosine, *torch.autograd.grad(cosine, (a, b))]
    return written


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    # A single column is a constant.
    shapes = ((f32, 512), (bf16, 512), (f64, 512), (f16, 309), (f32, 4096), (f32, 1))
    for dtype, columns in shapes:
        a, b = (inputs.normal(3, columns, dtype=dtype).requires_grad_() for _ in "ab")
        ops.paired_cosine(a, b).backward()
