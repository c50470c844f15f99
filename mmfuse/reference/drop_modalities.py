"""Drops whole modalities of single samples: phi <- scale keep phi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal
from .noise import standard_uniform


def drop_modalities(
    features: Sequence[Tensor],
    q: Tensor,
    noise_state: Tensor,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
    scale: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """See `mmfuse.ops.drop_modalities`; sample i of modality m draws the i-th number of its id."""
    rows = features[0].shape[0]
    keep = []
    for m, (stream_id, offset) in enumerate(zip(noise_ids, noise_offsets, strict=True)):
        u = standard_uniform(noise_state, rows, stream_id, offset)
        keep.append(~(u <= q[m]))  # a q that is NaN drops nothing
    mask = torch.stack(keep)
    return drop_modalities_backward(features, mask, scale), mask


def drop_modalities_backward(
    grads: Sequence[Tensor], keep: Tensor, scale: Tensor | None
) -> list[Tensor]:
    """Scale * grad for the samples that were kept, 0 for the others, whatever they hold."""
    out = []
    for grad, kept in zip(grads, keep, strict=True):
        dtype = accumulator(grad)
        value = grad.to(dtype) if scale is None else grad.to(dtype) * scale.to(dtype)
        shaped = kept.view(-1, *[1] * (grad.dim() - 1))
        out.append(torch.where(shaped, value, 0).to(grad.dtype).contiguous())
    return out


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    x = [normal(9, 5), normal(9, 2, 3)]
    q, scale = normal(2).sigmoid(), normal(1)[0]
    stream = torch.tensor([3, 0], device=q.device), [0, 1], [0, 0]
    keep = drop_modalities(x, q, *stream, scale)[1]
    return {
        "drop_modalities": (x, q, *stream, scale),
        "drop_modalities_backward": (x, keep, scale),
    }
