"""`discrepancy_ratios`: how far each modality is ahead of the others."""

from __future__ import annotations

from typing import Any

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.inputs import Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import discrepancy_ratios as reference


class ScoresInputs(Inputs):
    """Scores of M modalities; always float32, as modality_scores returns them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, torch.float32, device)
        self.scores = torch.linspace(0.6, 0.3, workload.modalities, device=device)
        self.nbytes = self.scores.nbytes


def eager_ratios(scores: Tensor) -> Tensor:
    """[M], in eager PyTorch."""
    return ((scores.unsqueeze(1) / scores).sum(dim=1) - 1) / (len(scores) - 1)


@compiled(dynamic=False)
def _ratios(scores: Tensor) -> Tensor:
    return reference.discrepancy_ratios(scores)


@register
class Ratios(Case):
    """Ratios alone."""

    name = "discrepancy_ratios"
    title = "discrepancy_ratios"
    kind = "scores"
    ops = ("discrepancy_ratios",)
    passes = 2
    workloads = (Workload("two_scores", "two modalities", "scores"),)
    make = staticmethod(ScoresInputs)

    def check(self, provider: str, i: ScoresInputs, result: Any) -> None:
        """Compares discrepancy ratios."""
        want = reference.discrepancy_ratios(i.scores.double())
        close("ratios", as_vector(result, i.device), want, 1e-5)

    def official(self, i: ScoresInputs) -> tuple[Tensor, Tensor]:
        return sequences.ogm.two_ratios(*i.scores.unbind())

    def foreach(self, i: ScoresInputs) -> Tensor:
        return eager_ratios(i.scores)

    def compile(self, i: ScoresInputs) -> Tensor:
        return _ratios(i.scores)

    def mmfuse(self, i: ScoresInputs, backend: str) -> Tensor:
        return ops.discrepancy_ratios(i.scores, backend=backend)
