"""g <- scale g + pull (w - w0) + noise_std N(0, 1), for a list of gradients, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._dtype import accumulator
from ._example import Normal
from .noise import standard_normal


def update_grads_(
    grads: Sequence[Tensor],
    scale: Tensor,
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    pull: Tensor | None,
    noise_std: Tensor | None,
    noise_state: Tensor | None,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
    finite: Tensor | None,
    sq_norm: Tensor | None,
) -> None:
    """See `mmfuse.ops.update_grads_`; ids and offsets place each tensor in the noise stream."""
    for t, grad in enumerate(grads):
        dtype = accumulator(grad)
        if sq_norm is not None:
            sq_norm[t] = grad.to(WIDE[grad.device.type]).square().sum()
        out = scale[t].to(dtype) * grad.to(dtype)
        if pull is not None:
            d = params[t].to(dtype)
            if anchors:
                d = d - anchors[t].to(dtype)
            # A factor of 0 adds nothing, even to a displacement that is not finite.
            out = torch.where(pull[t] == 0, out, out + pull[t].to(dtype) * d)
        if noise_std is not None and noise_state is not None:
            z = standard_normal(noise_state, grad.numel(), noise_ids[t], noise_offsets[t])
            noisy = out + noise_std[t].to(dtype) * z.to(dtype).view_as(out)
            out = torch.where(noise_std[t] == 0, out, noisy)
        grad.copy_(out)
        if finite is not None:
            finite.logical_and_(grad.isfinite().all())


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    lists = [[normal(n) for n in (5, 37)] for _ in range(3)]
    scale, pull, std = (normal(2).tanh() for _ in range(3))
    finite = torch.ones((), dtype=torch.bool, device=scale.device)
    stream = torch.tensor([3, 0], device=scale.device), [0, 1], [0, 0]
    rest = pull, std.abs(), *stream, finite, torch.empty_like(scale, dtype=WIDE[scale.device.type])
    grads, params, anchors = lists
    return {"update_grads_": (grads, scale, params, anchors, *rest)}
