"""`information_pull`: InfoReg's decision about two encoders of 62 tensors each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.gate import close
from engine.inputs import Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import information_pull as reference

BETA = 0.9
#: Tensors of a ResNet-18.
TENSORS = 62
TWO_NETWORKS = (Workload("two_decisions", "two modalities, 124 tensors", "decision"),)


class DecisionInputs(Inputs):
    """Scores of M modalities, of which the first is ahead, and who owns the tensors."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, torch.float32, device)
        count = workload.modalities
        self.scores = torch.linspace(-0.4, -1.2, count, device=device)
        self.window_open = torch.ones(count, dtype=torch.bool, device=device)
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        self.owner = tuple(m for m in range(count) for _ in range(TENSORS))
        self.index = torch.tensor(self.owner, device=device)
        # Owners, scale and pull of each tensor; what a modality has beside is less.
        self.nbytes = len(self.owner) * (8 + 2 * self.scores.element_size())


@register
class InfoRegDecision(Case):
    """Gap, strength, steps and each tensor's factors."""

    name = "information_pull"
    title = "InfoReg: information_pull"
    kind = "decision"
    ops = ("information_pull",)
    passes = 1
    half = False
    named_only = True
    workloads = TWO_NETWORKS
    make = staticmethod(DecisionInputs)

    def check(self, provider: str, i: DecisionInputs, result: Sequence[Tensor]) -> None:
        """Compares gap, strength and pull."""
        given = i.scores.double(), None, i.window_open, i.steps, i.index, BETA, None
        alpha, gap, _, _, pull = reference.information_pull(*given)
        for name, found, want in zip(
            ("coefficients", "gap", "pull"), result, (alpha, gap, pull), strict=True
        ):
            close(name, found, want, 1e-5)

    def foreach(self, i: DecisionInputs) -> tuple[Tensor, ...]:
        differences = i.scores.unsqueeze(1) - i.scores
        behind = differences > 0
        gap = (differences * behind).sum(1) / behind.sum(1).clamp_(min=1)
        alpha = torch.exp(BETA * torch.tanh(gap)) * (i.window_open & (gap > 0))
        return alpha, gap, alpha[i.index]

    def mmfuse(self, i: DecisionInputs, backend: str) -> tuple[Tensor, ...]:
        found = ops.information_pull(
            i.scores, i.window_open, i.steps, BETA, owner=i.owner, backend=backend
        )
        return found.coefficients, found.gap, found.pull
