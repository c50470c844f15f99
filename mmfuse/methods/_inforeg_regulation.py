"""InfoReg's regulation of the gradients: g <- g + alpha (w - w0), and |g|^2 from the same read.

`mmfuse.methods.inforeg` has the paper and the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loop.anchors import Anchors
from ..loop.modalities import Active, per_tensor
from ..ops import grad_stats


def regulate(
    active: Active,
    anchors: Anchors,
    coefficients: Tensor,
    trace_before_pull: bool,
    grad_scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Pulls the gradients; whether they are finite after it, and each one's |g|², float64 [T].

    |g|² is that of the unscaled gradient, before the pull or after it.
    """
    device = active.grads[0].device if active.grads else coefficients.device
    finite = torch.ones((), dtype=torch.bool, device=device)
    if not active.grads:
        return finite, torch.empty(0, dtype=torch.float64, device=device)
    pull = per_tensor(coefficients.to(device), active)
    if grad_scale is not None:
        pull = pull * grad_scale.to(pull)
    squares = None
    if trace_before_pull and active.shards:  # merged over the ranks
        squares = _sq_norm(active, backend)
    elif trace_before_pull:  # by the pull's own read
        squares = torch.empty(len(active.grads), dtype=torch.float64, device=pull.device)
    fused = None if active.shards else squares
    anchors.update_(active, torch.ones_like(pull), pull, finite, backend, fused)
    if squares is None:
        squares = _sq_norm(active, backend)
    if grad_scale is not None:
        squares = squares / grad_scale.to(squares).square()
    if active.shards:  # what another rank's part holds shows in the sum alone
        finite.logical_and_(squares.isfinite().all().to(finite.device))
    return finite, squares


def _sq_norm(active: Active, backend: str | None) -> Tensor:
    return active.whole(grad_stats(active.grads, backend=backend)).sq_norm.double()
