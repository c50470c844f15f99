"""RedReg's regulation of the gradients: g <- g + beta (d - c g), d = w - w0.

`mmfuse.methods.redreg` has the paper and the equations.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..loop.anchors import Anchors
from ..loop.modalities import Active, per_modality, per_tensor
from ..ops import GradStats
from ._redreg_equations import share

Projection = Literal["tensor", "encoder"]


def regulate(
    active: Active,
    anchors: Anchors,
    coefficients: Tensor,
    projection: Projection,
    grad_scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Updates the gradients; whether they are finite, and whether they also were."""
    device = active.grads[0].device if active.grads else coefficients.device
    finite = torch.ones((), dtype=torch.bool, device=device)
    if not active.grads:
        return finite, finite
    stats = anchors.stats(active, backend)
    were = stats.m2.isfinite().all()
    c = _share(stats, active, len(coefficients), projection, grad_scale)
    pull = per_tensor(coefficients.to(device), active).to(c)
    # 1 outright where nothing is pulled: there the share may be anything.
    scale = torch.where(pull == 0, 1.0, 1.0 - pull * c)
    if grad_scale is not None:
        pull = pull * grad_scale.to(pull)
    anchors.update_(active, scale, pull, finite, backend)
    if active.shards:  # what another rank's part holds shows in the sum alone
        finite.logical_and_(were.to(device))
    return finite, were & finite.to(were.device)


def _share(
    stats: GradStats,
    active: Active,
    count: int,
    projection: Projection,
    grad_scale: Tensor | None,
) -> Tensor:
    """[T] c, of each tensor or of all tensors of its encoder together."""
    dot, square = stats.dot, stats.sq_norm
    assert dot is not None
    if grad_scale is not None:
        dot, square = dot / grad_scale.to(dot), square / grad_scale.to(square).square()
    if projection == "tensor":
        return share(dot, square)
    dot, square = (per_modality(x, active.modality, count) for x in (dot, square))
    return per_tensor(share(dot, square), active)
