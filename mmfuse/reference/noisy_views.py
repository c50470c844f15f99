"""Two noisy views of one input, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal
from .noise import standard_normal


def noisy_views(
    x: Tensor,
    sigma: float,
    noise_state: Tensor,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.noisy_views`; one stream id and one offset for each view."""
    dtype = accumulator(x)
    views = []
    for stream_id, offset in zip(noise_ids, noise_offsets, strict=True):
        z = standard_normal(noise_state, x.numel(), stream_id, offset).to(dtype)
        views.append((x.to(dtype) + sigma * z.view(x.shape)).to(x.dtype))
    # The views as they are stored decide: an encoder gets to see those.
    difference = views[0].to(dtype) - views[1].to(dtype)
    return views[0], views[1], difference.square().mean()


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    x = normal(5, 7)
    return {"noisy_views": (x, 0.1, torch.tensor([3, 0], device=x.device), [0, 1], [0, 0])}
