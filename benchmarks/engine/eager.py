"""The best eager PyTorch we can write for lists of gradients, without a host sync.

A factor that a whole encoder shares is a 0-d tensor, for which the `_foreach_` ops have their
fused path on the GPU; only sums, which have no `_foreach_` op, are taken tensor by tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import GradientInputs


def squares(i: GradientInputs) -> Tensor:
    """‖g‖², [T]; of pieces: PyTorch's norm of 2^28 float32 on one CPU thread is 4 % too small."""
    each = torch.stack(torch._foreach_norm(i.pieces, 2, dtype=i.wide)).square_()
    return torch.zeros_like(i.numel).index_add_(0, i.piece_owner, each)


def std(i: GradientInputs) -> Tensor:
    """[T] from ‖g‖ and Σg, which is good enough for gradients: their mean is near zero."""
    sums = torch.stack([g.sum(dtype=i.wide) for g in i.grads])
    return ((squares(i) - sums.square() / i.numel) / (i.numel - 1)).clamp_(min=0).sqrt_()


def read(i: GradientInputs) -> list[list[Tensor]]:
    """Each encoder's gradients, from its parameters: a whole step finds them nowhere else.

    Each backward pass makes new ones, unless they are kept and set to zero.
    """
    return [[p.grad for p in params] for params in i.encoder_params]


def scale(
    i: GradientInputs, factors: Tensor, encoder_grads: list[list[Tensor]] | None = None
) -> None:
    """Multiplies the gradients of encoder m by factors[m]."""
    every = i.encoder_grads if encoder_grads is None else encoder_grads
    for grads, factor in zip(every, factors.unbind(), strict=True):
        torch._foreach_mul_(grads, factor)


def add_noise(i: GradientInputs, noise_std: Tensor) -> None:
    """Adds noise_std[t] · N(0, 1); all the noise comes from one call of the generator."""
    sizes = [g.numel() for g in i.grads]
    flat = torch.randn(sum(sizes), dtype=i.dtype, device=i.device)
    # The gradient's own format, without which `_foreach_` ops take tensor by tensor.
    noise = [
        z.view_as(g) if g.is_contiguous() else z.as_strided(g.shape, g.stride(), z.storage_offset())
        for z, g in zip(flat.split(sizes), i.grads, strict=True)
    ]
    torch._foreach_addcmul_(i.grads, noise, list(noise_std.to(i.dtype).unbind()))


def add_displacement(i: GradientInputs) -> None:
    """G + pull_m (w − w₀)."""
    displacement = torch._foreach_sub(i.params, i.anchors)
    for part, factor in zip(i.by_encoder(displacement), i.pull_by_encoder.unbind(), strict=True):
        torch._foreach_mul_(part, factor)
    torch._foreach_add_(i.grads, displacement)
