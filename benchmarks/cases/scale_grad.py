"""`scale_grad`: OGM at a feature, in the backward pass."""

from __future__ import annotations

import torch
from engine.case import Case, register
from engine.gate import close
from engine.gradients import COEFFICIENTS
from engine.inputs import Inputs
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops


class FeatureInputs(Inputs):
    """A feature, the gradient that reaches it, and its encoder's coefficient."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        self.feature = self._randn(shape, 1.0).requires_grad_()
        self.grad_output = self._randn(shape, 1.0)
        self.coefficient = torch.tensor(COEFFICIENTS[0], device=device)
        self.nbytes = self.feature.nbytes


@register
class ScaledGradient(Case):
    """Forward and backward; the released code scales parameters' gradients instead."""

    name = "scale_grad"
    title = "scale_grad: forward and backward"
    kind = "features"
    ops = ("scale_grad_backward",)
    passes = 2
    autograd = True
    make = staticmethod(FeatureInputs)

    def check(self, provider: str, i: FeatureInputs, result: Tensor) -> None:
        """Compares the gradient below a scaled feature."""
        want = i.coefficient.double() * i.grad_output.double()
        close("gradient", result, want, 2 * torch.finfo(i.dtype).eps)

    def foreach(self, i: FeatureInputs) -> Tensor:
        out = i.feature.view_as(i.feature)
        out.register_hook(lambda grad: i.coefficient * grad)
        return torch.autograd.grad(out, i.feature, i.grad_output)[0]

    def mmfuse(self, i: FeatureInputs, backend: str) -> Tensor:
        out = ops.scale_grad(i.feature, i.coefficient, backend=backend)
        return torch.autograd.grad(out, i.feature, i.grad_output)[0]
