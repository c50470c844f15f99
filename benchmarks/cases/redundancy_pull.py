"""`redundancy_pull`: RedReg's decision about two encoders of 62 tensors each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.gate import close
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.ops import GradStats, RedundancyRule, RedundancyState
from mmfuse.reference import redundancy_pull as reference

from .information_pull import DecisionInputs

WINDOW = 10
RULE = RedundancyRule(threshold=-1.0)


class RedundancyInputs(DecisionInputs):
    """Inputs with a history, a redundancy, and statistics of the gradients."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        count, tensors = workload.modalities, len(self.owner)
        self.scores = torch.linspace(0.6, 0.3, count, device=device)
        self.redundancy = torch.linspace(0.4, 0.5, count, device=device, dtype=torch.float64)
        self.gate = torch.ones((), device=device)
        history = torch.rand(
            count, WINDOW + 1, dtype=torch.float64, device=device, generator=self._generator
        )
        ones = [torch.ones(count, dtype=torch.float64, device=device) for _ in range(3)]
        self.state = RedundancyState(history, self.steps + WINDOW, *ones)
        numbers = torch.arange(1, tensors + 1, device=device)
        x = numbers.to(torch.float32)
        self.stats = GradStats(numbers, 1 / x, x, x.sin(), x)
        # The four statistics are read, too.
        self.nbytes += tensors * (8 + 3 * 4)


@register
class RedRegDecision(Case):
    """Growth, phase, strength, the new state and each tensor's factors."""

    name = "redundancy_pull"
    title = "RedReg: redundancy_pull"
    kind = "decision"
    ops = ("redundancy_pull",)
    passes = 1
    half = False
    named_only = True
    make = staticmethod(RedundancyInputs)

    def check(self, provider: str, i: RedundancyInputs, result: Sequence[Tensor]) -> None:
        """Compares phase, strength and each tensor's factors."""
        s = i.stats
        moments = s.numel, s.mean.double(), s.m2.double(), s.dot.double()
        given = i.scores.double(), i.redundancy, i.gate, *i.state, i.index, *moments, *RULE
        beta, _, phase, *_, scale, pull = reference.redundancy_pull(*given)
        wanted = phase, beta, scale, pull
        for name, found, want in zip(
            ("phase", "coefficients", "scale", "pull"), result, wanted, strict=True
        ):
            close(name, found, want, 1e-5)

    def foreach(self, i: RedundancyInputs) -> tuple[Tensor, ...]:
        old, momentum, count = i.state, RULE.momentum, len(i.scores)
        history = torch.cat([old.history[:, 1:], i.scores.double().unsqueeze(1)], 1)
        average = momentum * old.average + (1 - momentum) * i.redundancy
        weight = momentum * old.weight + (1 - momentum)
        growth = (history[:, -1] - history[:, 0]) / history[:, :-1].sum(1)
        growth = torch.where(old.steps + 1 > WINDOW, growth, 1.0)
        phase = i.redundancy * weight / average - RULE.gamma * growth.clamp(min=0)
        ahead = i.scores - (i.scores.sum() - i.scores) / (count - 1)
        first = (i.scores == i.scores.max()) & (phase > RULE.threshold)
        beta = torch.exp(RULE.beta * torch.tanh(ahead)) * i.gate * first
        pull = beta[i.index]
        assert i.stats.dot is not None
        return phase, beta, 1 - pull * i.stats.dot / i.stats.sq_norm, pull

    def mmfuse(self, i: RedundancyInputs, backend: str) -> tuple[Tensor, ...]:
        found = ops.redundancy_pull(
            i.scores,
            i.redundancy,
            i.gate,
            i.state,
            RULE,
            owner=i.owner,
            stats=i.stats,
            backend=backend,
        )
        return found.phase, found.coefficients, found.scale, found.pull
