"""A method's state after a step: new where the step counts, old where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._example import Normal


def keep_state_(
    state: Sequence[Tensor], values: Sequence[Tensor], finite: Tensor, sums: Tensor | None
) -> None:
    """See `mmfuse.ops.keep_state_`."""
    counts = finite if sums is None else finite & sums.isfinite().all()
    for old, value in zip(state, values, strict=True):
        torch.where(counts, value, old, out=old)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    state, finite = [normal(5), normal(2, 3)], torch.ones((), dtype=torch.bool)
    return {"keep_state_": (state, [x + 1 for x in state], finite.to(state[0].device), normal(3))}
