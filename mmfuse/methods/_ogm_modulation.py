"""OGM's modulation of the gradients: g <- k_m * g, and GE's noise, from one read and one write.

`mmfuse.methods.ogm` has the paper and the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..loop.modalities import Active
from ..loop.ranks import Group, agree
from ..noise import NoiseStream, default_stream
from ..ops import grad_stats, modulation_factors, update_grads_
from ..ops.modulation_factors import Formula, ModulationFactors

Noise = bool | Callable[[Tensor], Tensor]

# The released code adds this to the standard deviation of the noise.
_STD_EPS = 1e-8


class Rule(NamedTuple):
    """How a step modulates; alpha = 0 makes every coefficient 1."""

    alpha: float
    formula: Formula
    noise: Noise


@torch.no_grad()
def modulate(
    active: Active,
    scores: Tensor,
    rule: Rule,
    stream: NoiseStream | None,
    process_group: Group,
    found_inf: Tensor | None,
    backend: str | None,
) -> tuple[ModulationFactors, Tensor]:
    """Modulates the gradients in place; what was decided, and whether all are finite after it."""
    grads, noise = active.grads, rule.noise
    device = grads[0].device if grads else scores.device
    finite = torch.ones((), dtype=torch.bool, device=device)
    stats = active.whole(grad_stats(grads, backend=backend)) if noise and grads else None
    decided = modulation_factors(
        scores.to(device),
        rule.alpha,
        rule.formula,
        owner=active.modality,
        stats=stats,
        eps=_STD_EPS,
        backend=backend,
    )
    if stats is None or decided.noise_std is None:
        update_grads_(grads, decided.scale, finite=finite, backend=backend)
        return decided, finite
    if active.shards:  # what another rank's part holds shows in the sum alone
        finite.copy_(stats.m2.isfinite().all())
    if callable(noise):
        external = [noise(g) for g in grads]
        update_grads_(grads, decided.scale, finite=finite, backend=backend)
        for grad, z, std in zip(grads, external, decided.noise_std.unbind(), strict=True):
            grad.addcmul_(z, std.to(grad.device, grad.dtype))
        return decided, finite
    stream = default_stream(device) if stream is None else stream
    agree(stream, process_group)
    update_grads_(
        active.cut(grads),
        active.spread(decided.scale),
        noise_std=active.spread(decided.noise_std),
        stream=active.place(stream),
        finite=finite,
        backend=backend,
    )
    # A step that a GradScaler skips has not been.
    stream.advance(finite if found_inf is None else finite & (found_inf == 0).all())
    return decided, finite
