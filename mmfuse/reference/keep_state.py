"""A method's state after a step: new where the step counts, old where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_state_(
    state: Sequence[Tensor], values: Sequence[Tensor], finite: Tensor, sums: Tensor | None
) -> None:
    """See `mmfuse.ops.keep_state_`."""
    counts = finite if sums is None else finite & sums.isfinite().all()
    for old, value in zip(state, values, strict=True):
        torch.where(counts, value, old, out=old)
