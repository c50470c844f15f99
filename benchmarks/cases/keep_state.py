"""`keep_state_`: RedReg's state after a step, and the sums that InfoReg's step looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.gate import close
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops

from .redundancy_pull import RedundancyInputs


class StateInputs(RedundancyInputs):
    """New values for every tensor of a state, and finite sums."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        self.values = [x + 1 for x in self.state]
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.sums = torch.ones(len(self.owner), dtype=torch.float64, device=device)
        # Read and written once; the sums are read.
        self.nbytes = 2 * sum(x.nbytes for x in self.values) + self.sums.nbytes


@register
class Keeping(Case):
    """All tensors of the state, where a step counts."""

    name = "keep_state"
    title = "keep_state_"
    kind = "decision"
    ops = ("keep_state_",)
    passes = 1
    half = False
    named_only = True
    make = staticmethod(StateInputs)

    def check(self, provider: str, i: StateInputs, result: Sequence[Tensor]) -> None:
        """Compares with the values, to the bit."""
        for k, (found, want) in enumerate(zip(result, i.values, strict=True)):
            close(f"state {k}", found.double(), want.double(), 0.0)

    def foreach(self, i: StateInputs) -> tuple[Tensor, ...]:
        counts = i.finite & i.sums.isfinite().all()
        for old, value in zip(i.state, i.values, strict=True):
            torch.where(counts, value, old, out=old)
        return tuple(i.state)

    def mmfuse(self, i: StateInputs, backend: str) -> tuple[Tensor, ...]:
        ops.keep_state_(i.state, i.values, i.finite, i.sums, backend=backend)
        return tuple(i.state)
