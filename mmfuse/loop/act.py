"""The act stage of every method on gradients or updates: one read and one write of each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import NoiseStream
from ..ops import grad_stats, update_grads_
from .anchors import Anchors
from .contract import Act, MakesNoise
from .modalities import Active


def act_on(
    active: Active,
    act: Act,
    finite: Tensor,
    *,
    second: Anchors | Sequence[Tensor] | None = None,
    noise: NoiseStream | MakesNoise | None = None,
    sq_norm: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """In place, g ← scale·g + pull·(w − w₀) + noise_std·N(0, 1).

    Args:
        active: The tensors g and w; this rank's parts of them.
        act: What becomes of them.
        finite: 0-d bool, set to False where one ends up with a NaN or an Inf on this rank.
        second: w₀, with `act.pull`.
        noise: What the noise is drawn from, or what makes it; with `act.noise_std`.
        sq_norm: [T] float64, receives Σg² before the update; with parts that are whole.
        backend: Name of a backend; None for the best one.
    """
    scale, pull, noise_std = act
    if scale is None:
        like = next((v for v in (pull, noise_std) if v is not None), None)
        scale = torch.ones(len(active.grads), device=finite.device) if like is None else None
        scale = torch.ones_like(like) if like is not None else scale
    assert scale is not None
    if isinstance(second, Anchors) and pull is not None:
        assert noise_std is None
        second.update_(active, scale, pull, finite, backend, sq_norm)
        return
    if noise_std is not None and not isinstance(noise, NoiseStream):
        assert noise is not None
        made = [noise(g) for g in active.grads]
        update_grads_(active.grads, scale, finite=finite, backend=backend)
        for grad, z, std in zip(active.grads, made, noise_std.unbind(), strict=True):
            grad.addcmul_(z, std.to(grad.device, grad.dtype))
        return
    if noise_std is None and pull is None:
        update_grads_(active.grads, scale, finite=finite, sq_norm=sq_norm, backend=backend)
        return
    anchored = pull is not None and second is not None and not isinstance(second, Anchors)
    update_grads_(
        active.cut(active.grads),
        active.spread(scale),
        params=active.cut(active.params) if anchored else None,
        anchors=active.cut(second) if anchored else None,  # type: ignore[arg-type]
        pull=active.spread(pull) if anchored and pull is not None else None,
        noise_std=None if noise_std is None else active.spread(noise_std),
        stream=active.place(noise) if isinstance(noise, NoiseStream) else None,
        finite=finite,
        backend=backend,
    )


def squares_of(active: Active, backend: str | None) -> Tensor:
    """Σg² of each whole tensor: float64 [T]."""
    return active.whole(grad_stats(active.grads, backend=backend)).sq_norm.double()
