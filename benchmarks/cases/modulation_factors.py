"""`modulation_factors`: OGM's decision, from logits to coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import as_vector, close
from engine.gradients import GradientInputs
from engine.inputs import ALPHA, LogitsInputs
from torch import Tensor

from mmfuse import ogm_coefficients, ops
from mmfuse.reference import discrepancy_ratios as reference_ratios
from mmfuse.reference import modality_scores as reference_scores

from .discrepancy_ratios import eager_ratios
from .modality_scores import rounding_of_released_sums, stacked_scores

#: The ops of mmfuse that a decision calls.
OPS = ("modality_scores", "modulation_factors")


def exact_decision(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and ratios in float64."""
    prob, _, _ = reference_scores.modality_scores([z.double() for z in logits], labels)
    rho = reference_ratios.discrepancy_ratios(prob)
    return ogm_coefficients(rho, ALPHA, "cvpr"), rho


@compiled(dynamic=False)
def _decide(logits: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    prob, _, _ = reference_scores.modality_scores(logits, labels)
    rho = reference_ratios.discrepancy_ratios(prob)
    return ogm_coefficients(rho, ALPHA, "cvpr"), rho


@register
class Decision(Case):
    """Scores, ratios and coefficients; OGM's steps begin with it."""

    name = "decision"
    title = "decision: scores, ratios, coefficients"
    kind = "logits"
    ops = OPS
    passes = 1
    make = staticmethod(LogitsInputs)

    def check(self, provider: str, i: LogitsInputs, result: Any) -> None:
        """Compares coefficients and ratios."""
        coefficients, rho = result
        tolerance = 1e-4 + rounding_of_released_sums(provider, i)
        want, want_rho = exact_decision(i.logits, i.labels)
        close("ratios", as_vector(rho, i.device), want_rho, tolerance)
        close("coefficients", as_vector(coefficients, i.device), want, 0.0, tolerance)

    def official(self, i: LogitsInputs) -> tuple[list[Tensor | float], tuple[Tensor, Tensor]]:
        ratios = sequences.ogm.two_ratios(*sequences.ogm.batch_scores(i.logits, i.labels))
        return sequences.ogm.decide(*ratios, ALPHA), ratios

    def foreach(self, i: LogitsInputs) -> tuple[Tensor, Tensor]:
        rho = eager_ratios(stacked_scores(i))
        return torch.where(rho > 1, 1 - torch.tanh(ALPHA * rho), 1.0), rho

    def compile(self, i: LogitsInputs) -> tuple[Tensor, Tensor]:
        return _decide(i.logits, i.labels)

    def mmfuse(self, i: LogitsInputs, backend: str) -> tuple[Tensor, Tensor]:
        scores = ops.modality_scores(i.logits, i.labels, backend=backend)
        found = ops.modulation_factors(scores.prob, ALPHA, "cvpr", backend=backend)
        return found.coefficients, found.ratios


@register
class Factors(Case):
    """The decision with statistics: coefficient and noise of each tensor, as OGM-GE wants them."""

    name = "modulation_factors"
    title = "modulation_factors with statistics"
    kind = "gradients"
    ops = ("modulation_factors",)
    encoders = 2
    named_only = True
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: Sequence[Tensor]) -> None:
        """Compares the factors of every tensor."""
        scale, noise_std = result
        scores, stats = _known(i)
        rho = reference_ratios.discrepancy_ratios(scores.double())
        k = ogm_coefficients(rho, ALPHA, "tpami")
        close("scale", scale, k[i.modality_index], 1e-5)
        close("noise_std", noise_std, (stats.m2.double() / (stats.numel - 1)).sqrt(), 1e-5)

    def foreach(self, i: GradientInputs) -> Sequence[Tensor]:
        scores, stats = _known(i)
        rho = eager_ratios(scores)
        k = torch.where(rho > 1, (1 - ALPHA * torch.tanh(rho - 1)).clamp(min=0), 1.0)
        return k[i.modality_index], (stats.m2 / (stats.numel - 1)).sqrt()

    def mmfuse(self, i: GradientInputs, backend: str) -> Sequence[Tensor]:
        scores, stats = _known(i)
        found = ops.modulation_factors(
            scores, ALPHA, owner=i.modality, stats=stats, backend=backend
        )
        return found.scale, found.noise_std


def _known(i: GradientInputs) -> tuple[Tensor, ops.GradStats]:
    """Scores and statistics, which are not timed."""

    def make() -> tuple[Tensor, ops.GradStats]:
        scores = torch.tensor([0.6, 0.3], dtype=i.wide, device=i.device)
        return scores, ops.grad_stats(i.grads)

    return i.cached("scores and statistics", make)
