"""`progress_factors`: CGGM's decision about two encoders of 62 tensors each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.gate import close
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import progress_factors as reference

from .information_pull import DecisionInputs

RHO = 1.3


class ProgressInputs(DecisionInputs):
    """Metrics of M modalities, and those of the step before."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        count = workload.modalities
        self.scores = torch.linspace(0.6, 0.3, count, dtype=torch.float64, device=device)
        self.last = torch.full((count, count), 0.25, dtype=torch.float64, device=device)
        self.shares = torch.ones(count, dtype=torch.float64, device=device)


def decide(scores: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and progress, of scores [M] and the last ones."""
    progress = scores - last
    whole = progress.sum() + 1e-8
    return RHO * (whole - progress) / whole, progress


@register
class CGGMDecision(Case):
    """Progress, coefficients and each tensor's factor."""

    name = "progress_factors"
    title = "CGGM: progress_factors"
    kind = "decision"
    ops = ("progress_factors",)
    passes = 1
    half = False
    named_only = True
    make = staticmethod(ProgressInputs)

    def check(self, provider: str, i: ProgressInputs, result: Sequence[Tensor]) -> None:
        """Compares coefficients, progress and factors."""
        given = i.scores, i.last, i.shares, i.index, RHO, float("inf"), True
        coefficients, progress, _, scale, *_ = reference.progress_factors(*given)
        for name, found, want in zip(
            ("coefficients", "progress", "scale"),
            result,
            (coefficients, progress, scale),
            strict=True,
        ):
            close(name, found, want, 1e-6)

    def foreach(self, i: ProgressInputs) -> tuple[Tensor, ...]:
        coefficients, progress = decide(i.scores, i.last.diagonal())
        return coefficients, progress, coefficients[i.index].float()

    def mmfuse(self, i: ProgressInputs, backend: str) -> tuple[Tensor, ...]:
        found = ops.progress_factors(
            i.scores,
            i.last,
            i.shares,
            RHO,
            owner=i.owner,
            scale_dtype=torch.float32,
            backend=backend,
        )
        return found.coefficients, found.progress, found.scale
