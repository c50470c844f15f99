"""grad_stats: lists of tensors of all sizes, without and with parameters and anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import ops

from ._inputs import NARROW, Inputs, Samples, Small, mirrors


def arguments(device: str) -> Samples:
    g = [torch.randn(5, 3, device=device), torch.randn(0, device=device), torch.randn(9).to(device)]
    w, w0 = [torch.randn_like(t) for t in g], [torch.randn_like(t) for t in g]
    wide = [t.double() for t in g]
    return {"grad_stats": [(g, [], []), (g, w, w0), (g, w, []), (wide, [], [])]}


def small(device: str) -> Small:
    grads = [torch.randn(n, device=device) for n in (33, 9, 5)]
    return lambda: ops.grad_stats(grads)


def short(device: str) -> Small:
    grads = [torch.randn(1000, device=device) for _ in range(100)]
    return lambda: (ops.grad_stats(grads), ops.grad_stats(grads, grads, grads))


def case(inputs: Inputs) -> list[Tensor]:
    """A chunk has 16,384 elements."""
    found = []
    sizes = (37,) if inputs.interpreted else (1, 37, 47, 1027, 0, 32768 + 37)
    for offset in (0, 1):
        for grads, params, anchors in mirrors(inputs, sizes, offset):
            for beside in ((), (params,), (params, anchors)):
                found.append(ops.grad_stats(grads, *beside))
    for dtype in NARROW:
        grads, params, anchors = inputs.beyond_short(dtype)
        for beside in ((), (params,), (params, anchors)):
            found.append(ops.grad_stats(grads, *beside))
    # More than a table of the second kernel holds, which is 2,000.
    found.append(ops.grad_stats(inputs.many(40 if inputs.interpreted else 2001)))
    found.append(ops.grad_stats([inputs.normal(7)]))
    # Triton reads a whole chunk without a mask.
    found.append(ops.grad_stats([inputs.normal(4096 + 7)]))
    return [t for stats in found for t in stats if t is not None]


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for offset, *dtypes in (
        (0, f32),
        (1, f32),
        (0, bf16),
        (0, f64),
        (0, f32, f32, f32),
        (0, bf16, f32, bf16),
        (1, f16, f16, f16),
        (0, f64, f64, f64),
        (0, f32, f32),
        (0, bf16, f32),
        (1, f16, f16),
        (0, f64, f64),
    ):
        ops.grad_stats(*inputs.lists((37,), len(dtypes), *dtypes, offset=offset))
