"""scale_grad: the forward pass is the identity, so that its backward is the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tolerances
import torch
from torch import Tensor

from mmfuse import NoiseStream, ops

from ._inputs import DTYPES, Inputs, Samples, Small


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


def _bound(arguments: Sequence[Any], exact: Sequence[Tensor]) -> list[Tensor]:
    grad, coefficient, noise_std = arguments[:3]
    scaled = coefficient.cpu().double() * grad.cpu().double()
    sigma = torch.zeros(()).double() if noise_std is None else noise_std.cpu().double()
    # The noise is the rest of the exact result, beside the scaled gradient.
    z = torch.where(sigma > 0, (exact[0] - scaled) / sigma, 0.0)
    zero = torch.zeros(())
    return [tolerances.updated_grad(grad.dtype, exact[0], scaled, zero, sigma, z)]


bounds = {"scale_grad_backward": _bound}


def small(device: str) -> Small:
    x = torch.randn(9, 33, device=device).requires_grad_()
    k, grad = torch.tensor(0.5, device=device), torch.ones_like(x)
    return lambda: torch.autograd.grad(ops.scale_grad(x, k), x, grad)


def short(device: str) -> Small:
    # PyTorch shares out a copy of more.
    x = torch.randn(64, 512, device=device).requires_grad_()
    k, grad = torch.tensor(0.5, device=device), torch.ones_like(x)
    return lambda: torch.autograd.grad(ops.scale_grad(x, k), x, grad)


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


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, with_noise, offset in (
        (f32, False, 0),
        (bf16, False, 0),
        (f32, True, 0),
        (f16, True, 1),
        (f64, True, 0),
    ):
        x = inputs.normal(47, dtype=dtype, offset=offset).requires_grad_()
        factor = inputs.vector(0.7, dtype=torch.promote_types(dtype, f32))[0]
        noise = {"noise_std": factor, "stream": inputs.stream()} if with_noise else {}
        grad = inputs.normal(47, dtype=dtype, offset=offset)
        torch.autograd.grad(ops.scale_grad(x, factor, **noise), x, grad)
