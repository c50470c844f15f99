"""noisy_views: with and without noise, from any place of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse import NoiseStream, ops

from ._inputs import DTYPES, Inputs, Samples


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


def case(inputs: Inputs) -> list[Tensor]:
    """A chunk has 4,096 elements."""
    written: list[Tensor] = []
    numel = 37 if inputs.interpreted else 2 * 4096 + 47
    for dtype in DTYPES:
        for offset, count in ((0, None), (1, None), (0, 2), (1, 2)):
            x = inputs.normal(numel, dtype=dtype, offset=offset)
            written += ops.noisy_views(x, 0.5, inputs.stream(count))
    return [*written, *ops.noisy_views(inputs.normal(5), 0.0, inputs.stream())]
