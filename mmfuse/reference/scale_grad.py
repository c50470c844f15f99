"""The backward pass of `scale_grad`: coefficient * gradient + noise_std * N(0, 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal
from .noise import standard_normal


def scale_grad_backward(
    grad: Tensor,
    coefficient: Tensor,
    noise_std: Tensor | None,
    noise_state: Tensor | None,
    noise_id: int,
    noise_offset: int,
) -> Tensor:
    """See `mmfuse.ops.scale_grad`."""
    dtype = accumulator(grad)
    out = coefficient.to(dtype) * grad.to(dtype)
    if noise_std is not None and noise_state is not None:
        z = standard_normal(noise_state, grad.numel(), noise_id, noise_offset)
        noisy = out + noise_std.to(dtype) * z.to(dtype).view_as(out)
        out = torch.where(noise_std == 0, out, noisy)
    return out.to(grad.dtype)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    grad, factors = normal(5, 7), normal(2).exp().unbind()
    state = torch.tensor([3, 0], device=grad.device)
    return {"scale_grad_backward": (grad, *factors, state, 1, 0)}
