"""The best eager PyTorch we can write for lists of gradients, without a host sync.

A factor that a whole encoder shares is a 0-d tensor, for which the `_foreach_` ops have their
fused path on the GPU; only sums, which have no `_foreach_` op, are taken tensor by tensor.

On a CPU an operator costs a microsecond, and a list of temporaries as large as the gradients
costs fresh pages in every call and a way through memory: there each tensor has its temporary, which
the next one takes over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import NORM_PIECE, GradientInputs

# Elements of a product that a core's cache holds beside its factors.
_CACHED_PIECE = 2**17


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
    """Adds noise_std[t] · N(0, 1); on a GPU all the noise comes from one call of the generator."""
    std = noise_std.to(i.dtype)
    if _one_by_one(i.device):
        for g, s in zip(i.grads, std.unbind(), strict=True):
            g.addcmul_(torch.randn_like(g), s)
        return
    sizes = [g.numel() for g in i.grads]
    flat = torch.randn(sum(sizes), dtype=i.dtype, device=i.device)
    # Without the size of its result it would wait for the device.
    flat *= std.repeat_interleave(i.sizes, output_size=flat.numel())
    # The gradient's own format, without which `_foreach_` ops take tensor by tensor.
    noise = [
        z.view_as(g) if g.is_contiguous() else z.as_strided(g.shape, g.stride(), z.storage_offset())
        for z, g in zip(flat.split(sizes), i.grads, strict=True)
    ]
    torch._foreach_add_(i.grads, noise)


def add_displacement(i: GradientInputs) -> None:
    """G + pull_m (w − w₀)."""
    if _one_by_one(i.device):
        pulls = i.pull.to(i.dtype).unbind()
        for g, p, anchor, pull in zip(i.grads, i.params, i.anchors, pulls, strict=True):
            g.addcmul_(p - anchor, pull)
        return
    displacement = torch._foreach_sub(i.params, i.anchors)
    for part, factor in zip(i.by_encoder(displacement), i.pull_by_encoder.unbind(), strict=True):
        torch._foreach_mul_(part, factor)
    torch._foreach_add_(i.grads, displacement)


def dots(i: GradientInputs, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Σ x y of tensors as they lie in memory, [T]."""
    if _one_by_one(i.device):
        return torch.stack([_dot(i, x, y) for x, y in zip(xs, ys, strict=True)])
    return torch.stack([p.sum(dtype=i.wide) for p in torch._foreach_mul(list(xs), list(ys))])


def displacement_dots(i: GradientInputs) -> Tensor:
    """⟨g, w − w₀⟩, [T]."""
    if _one_by_one(i.device):
        rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, strict=True)
        return torch.stack([_dot(i, p - anchor, g) for g, p, anchor in rows])
    products = torch._foreach_sub(i.params, i.anchors)
    torch._foreach_mul_(products, i.grads)
    return torch.stack([p.sum(dtype=i.wide) for p in products])


def pull_orthogonally(i: GradientInputs) -> None:
    """G + β (d − ⟨g, d⟩ / ‖g‖² g), where d = w − w₀."""
    beta = i.beta.to(i.dtype)
    if _one_by_one(i.device):
        norms = squares(i).unbind()
        rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, norms, strict=True)
        for g, p, anchor, norm in rows:
            d = p - anchor
            g *= (1 - i.beta * _dot(i, d, g) / (norm + 1e-12)).to(i.dtype)
            g.addcmul_(d, beta)
        return
    displacement = torch._foreach_sub(i.params, i.anchors)
    scale = 1 - i.beta * dots(i, displacement, i.grads) / (squares(i) + 1e-12)
    torch._foreach_mul_(i.grads, list(scale.to(i.dtype).unbind()))
    torch._foreach_mul_(displacement, beta)
    torch._foreach_add_(i.grads, displacement)


def _one_by_one(device: torch.device) -> bool:
    """True where a temporary of each tensor is faster than lists of all; not if launches cost."""
    return device.type == "cpu"


def _dot(i: GradientInputs, x: Tensor, y: Tensor) -> Tensor:
    """Σ x y of a flat tensor, in pieces: by BLAS, as `squares`, where its sum is wide enough."""
    size = NORM_PIECE if i.wide == i.dtype else _CACHED_PIECE
    if x.numel() <= size:
        return _product(i, x, y)
    rows = zip(x.split(size), y.split(size), strict=True)
    return torch.stack([_product(i, a, b) for a, b in rows]).sum()


def _product(i: GradientInputs, x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y) if i.wide == i.dtype else (x * y).sum(dtype=i.wide)
