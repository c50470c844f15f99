"""noisy_views: with and without noise, from any place of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import NoiseStream, ops

from ._inputs import DTYPES, Inputs, Samples, Small


def arguments(device: str) -> Samples:
    x, state = torch.randn(4, 3, device=device), NoiseStream(3, device).state
    return {
        "noisy_views": [
            (x, 0.1, state, [0, 1], [0, 0]),
            (x.clone().requires_grad_(), 0.1, state, [7, 2], [5, 2**31 + 1]),
            (x.half(), 0.0, state, [0, 1], [0, 0]),
        ]
    }


def undefined(device: str) -> Samples:
    nothing, state = torch.empty(0, 3, device=device), NoiseStream(3, device).state
    return {"noisy_views": [(nothing, 0.1, state, [0, 1], [0, 0])]}


def small(device: str) -> Small:
    x, stream = torch.randn(9, 33, device=device), NoiseStream(3, device)
    return lambda: ops.noisy_views(x, 0.1, stream)


def short(device: str) -> Small:
    x, stream = torch.randn(65, 512, device=device), NoiseStream(3, device)
    return lambda: ops.noisy_views(x, 0.1, stream)


def case(inputs: Inputs) -> list[Tensor]:
    """A chunk has 4,096 elements."""
    written: list[Tensor] = []
    numel = 37 if inputs.interpreted else 2 * 4096 + 47
    for dtype in DTYPES:
        for offset, count in ((0, None), (1, None), (0, 2), (1, 2)):
            x = inputs.normal(numel, dtype=dtype, offset=offset)
            written += ops.noisy_views(x, 0.5, inputs.stream(count))
    return [*written, *ops.noisy_views(inputs.normal(5), 0.0, inputs.stream())]


def compiled(inputs: Inputs) -> None:
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for dtype, offset, second in (
        (f32, 0, 0),
        (bf16, 0, 0),
        (f64, 0, 0),
        (f16, 1, 0),
        (f32, 0, 5),
        (bf16, 1, 5),
    ):
        x = inputs.normal(47, dtype=dtype, offset=offset)
        # A second view whose noise starts elsewhere in a block is out of phase with the first.
        ops.noisy_views(x, 0.5, inputs.stream().place([7, 8], [0, second]))
