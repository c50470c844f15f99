"""Count, mean, centred second moment and displacement products of a list of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._dtype import accumulator
from ._example import Normal


def grad_stats(
    grads: Sequence[Tensor], params: Sequence[Tensor], anchors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.grad_stats`; moments are [2, T], or [4, T] with params."""
    dtype = accumulator(*grads)
    if not grads:
        return torch.empty(0, dtype=torch.int64), torch.empty(4 if params else 2, 0, dtype=dtype)
    device = grads[0].device
    wide = WIDE[device.type]
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    numel = [torch.full((), g.numel(), dtype=torch.int64, device=device) for g in grads]
    columns = []
    for t, grad in enumerate(grads):
        # float64 throughout: a mean rounded to float32 would leave n·(its error)² in m2.
        g = grad.to(wide)
        mean = g.mean() if g.numel() else g.sum()
        away = g - mean
        if wide != torch.float64 and g.numel():  # which is taken off again where there is no other
            missed = away.mean()
            mean, away = mean + missed, away - missed
        column = [mean, away.square().sum()]
        if params:
            d = params[t].to(wide)
            if anchors:
                d = d - anchors[t].to(wide)
            column += [(d * g).sum(), d.square().sum()]
        columns.append(torch.stack(column).to(dtype))
    return torch.stack(numel), torch.stack(columns, dim=1)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    lists = [[normal(n) for n in (5, 37)] for _ in range(3)]
    return {"grad_stats": tuple(lists)}
