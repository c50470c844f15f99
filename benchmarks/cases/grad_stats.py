"""`grad_stats`: each gradient's moments, and its product with the displacement."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from engine import eager
from engine.case import Case, register
from engine.compiled import stats_of
from engine.gate import STATS_TOLERANCE, as_vector, close
from engine.gradients import GradientInputs
from torch import Tensor

from mmfuse import ops


@register
class Deviations(Case):
    """Standard deviations, as OGM-GE wants them."""

    name = "grad_stats"
    title = "grad_stats: standard deviations"
    kind = "gradients"
    ops = ("grad_stats",)
    passes = 1
    make = staticmethod(GradientInputs)

    def check(self, provider: str, i: GradientInputs, result: Any) -> None:
        """Compares standard deviations."""
        tolerance = STATS_TOLERANCE + torch.finfo(i.dtype).eps
        close("standard deviations", as_vector(result, i.device), i.exact_stats.std, tolerance)

    def official(self, i: GradientInputs) -> list[float]:
        return [p.grad.std().item() for p in i.params]

    def foreach(self, i: GradientInputs) -> Tensor:
        return eager.std(i)

    def compile(self, i: GradientInputs) -> Tensor:
        return torch.cat([stats_of(g).std for g in i.flat_grads])

    def mmfuse(self, i: GradientInputs, backend: str) -> Tensor:
        return ops.grad_stats(i.grads, backend=backend).std


@register
class Products(Case):
    """⟨w − w₀, g⟩ and ‖g‖², as RedReg wants them."""

    name = "grad_stats_anchors"
    title = "grad_stats with anchors"
    kind = "gradients"
    ops = ("grad_stats",)
    passes = 3
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(self, provider: str, i: GradientInputs, result: Any) -> None:
        """Compares both; the product to the size of its terms, which may cancel."""
        want = i.exact_stats
        dots, squares = (as_vector(values, i.device) for values in result)
        tolerance = STATS_TOLERANCE + 2 * torch.finfo(i.dtype).eps
        close("‖g‖²", squares, want.sq_norm, tolerance)
        size = (want.disp_sq * want.sq_norm).sqrt()
        close("⟨w − w₀, g⟩", dots / size, want.dot / size, 0.0, tolerance)

    def official(self, i: GradientInputs) -> tuple[list[Tensor], list[Tensor]]:
        dots, squares = [], []
        for p, anchor in zip(i.params, i.anchors, strict=True):
            dots.append(((p - anchor) * p.grad).sum())
            squares.append((p.grad * p.grad).sum())
        return dots, squares

    def foreach(self, i: GradientInputs) -> tuple[Tensor, Tensor]:
        return eager.displacement_dots(i), eager.squares(i)

    def compile(self, i: GradientInputs) -> tuple[Tensor, Tensor]:
        rows = zip(i.flat_grads, i.flat_params, i.flat_anchors, strict=True)
        stats = [stats_of(*row) for row in rows]
        return torch.cat([s.dot for s in stats]), torch.cat([s.sq_norm for s in stats])

    def mmfuse(self, i: GradientInputs, backend: str) -> tuple[Tensor, Tensor]:
        stats = ops.grad_stats(i.grads, i.params, i.anchors, backend=backend)
        return stats.dot, stats.sq_norm
