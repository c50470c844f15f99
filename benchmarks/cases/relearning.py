"""ReLearning: the reset of all encoders, between epochs."""

from __future__ import annotations

from functools import partial

import torch
from engine import sequences
from engine.case import Case, register
from engine.gate import UPDATE_TOLERANCE, check_windows
from engine.gradients import GradientInputs
from engine.windows import windows
from torch import Tensor

from mmfuse import ops


@register
class Reset(Case):
    """w ← α w₀ + (1 − α) w; what the inputs call gradients stands for w, their params for w₀."""

    name = "relearning_reset"
    title = "ReLearning: the reset"
    kind = "gradients"
    ops = ("update_grads_",)
    passes = 3
    make = staticmethod(partial(GradientInputs, anchored=True))

    def check(self, provider: str, i: GradientInputs, result: object) -> None:
        places = windows([g.numel() for g in i.pristine])

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            flat = [t.detach().flatten() for t in tensors]
            return [flat[t][start:end].double() for t, start, end in places]

        alpha = [float(i.scale[t]) for t, _, _ in places]
        rows = zip(alpha, cut(i.params), cut(i.pristine), strict=True)
        want = [a * start + (1 - a) * now for a, start, now in rows]
        check_windows(places, cut(i.results()), want, UPDATE_TOLERANCE[i.dtype])

    def official(self, i: GradientInputs) -> None:
        weights = i.coefficients.to(i.dtype).unbind()
        for p, m in zip(i.params, i.modality, strict=True):
            p.grad = sequences.relearning.mixed(weights[m], p.detach(), p.grad)

    def foreach(self, i: GradientInputs) -> None:
        weights = [float(a) for a in i.cached("weights", i.scale.tolist)]
        with torch.no_grad():
            torch._foreach_lerp_(i.grads, i.params, weights)

    def mmfuse(self, i: GradientInputs, backend: str) -> None:
        ops.update_grads_(i.grads, 1 - i.scale, params=i.params, pull=i.scale, backend=backend)
