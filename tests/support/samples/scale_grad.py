"""scale_grad: the forward pass is the identity, so that its backward is the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import NoiseStream, ops

from ._inputs import DTYPES, Inputs, Samples


def arguments(device: str) -> Samples:
    grad, k = torch.randn(5, 3, device=device), torch.tensor(0.5, device=device)
    state = NoiseStream(3, device).state
    return {
        "scale_grad_backward": [
            (grad, k, None, None, 0, 0),
            (grad.clone().requires_grad_(), k, None, None, 0, 0),
            (grad, k, k, state, 3, 1),
        ]
    }


def case(inputs: Inputs) -> list[Tensor]:
    written = []
    numel = 1027 if inputs.interpreted else 16384 + 47
    for dtype in DTYPES:
        for offset in (0, 1):
            for with_noise in (False, True):
                x = inputs.normal(numel, dtype=dtype, offset=offset).requires_grad_()
                y = ops.scale_grad(
                    x,
                    inputs.vector(0.7)[0],
                    noise_std=inputs.vector(0.3)[0] if with_noise else None,
                    stream=inputs.stream(1 if offset else None) if with_noise else None,
                )
                grad = inputs.normal(numel, dtype=dtype, offset=offset)
                written += torch.autograd.grad(y, x, grad)
    return written
