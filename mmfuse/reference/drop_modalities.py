"""Drops whole modalities of single samples: phi <- scale keep phi."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dtype import accumulator
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
