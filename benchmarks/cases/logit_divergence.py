"""`logit_divergence`: how far each modality's logits are from another's, and the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import UPDATE_TOLERANCE, close
from engine.inputs import Inputs, wide_of
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import logit_divergence as reference


class PairsOfLogits(Inputs):
    """A student's logits of each modality, and a teacher's that are somewhat like them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.classes)
        self.first = [self._randn(shape, 1.0) for _ in range(workload.modalities)]
        self.second = [(z + self._randn(shape, 0.5)).requires_grad_() for z in self.first]
        self.first = [z.requires_grad_() for z in self.first]
        self.nbytes = sum(z.nbytes for z in (*self.first, *self.second))


def exact(i: PairsOfLogits, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The divergences in float64, and the gradients of their sum."""
    pairs = [[z.detach().double() for z in logits] for logits in (i.first, i.second)]
    place = reference.KINDS.index(kind)
    value, rows = reference.logit_divergence(*pairs, place, False)
    one = torch.ones_like(value)
    grads = reference.logit_divergence_backward(one, rows, *pairs, place, True, True)
    return value, grads


def eager_divergence(i: PairsOfLogits, kind: str) -> Tensor:
    """All pairs in one stack; a copy of it takes less than as many calls again."""
    wide = wide_of(i.dtype)
    logs = [torch.stack(logits).log_softmax(2, dtype=wide) for logits in (i.first, i.second)]
    if kind == "kl":
        return (logs[0].exp() * (logs[0] - logs[1])).sum(2).mean(1)
    middle = torch.logaddexp(*logs) - math.log(2)
    return (middle.exp() * (middle - (logs[0] + logs[1]) / 2)).sum(2).mean(1)


@compiled(dynamic=False)
def _divergence(first: list[Tensor], second: list[Tensor], kind: int) -> Tensor:
    return reference.logit_divergence(first, second, kind, False)[0]


@compiled(dynamic=False)
def _with_gradients(first: list[Tensor], second: list[Tensor], kind: int) -> list[Tensor]:
    value, rows = reference.logit_divergence(first, second, kind, False)
    one = torch.ones_like(value)
    grads = reference.logit_divergence_backward(one, rows, first, second, kind, True, True)
    return [value, *grads]


@register
class Divergence(Case):
    """KL, as of a distillation; forward."""

    name = "logit_divergence"
    title = "logit_divergence: KL"
    kind = "pairs_of_logits"
    ops = ("logit_divergence",)
    passes = 1
    workloads = tuple(
        Workload(
            f"pairs_{batch}x{classes}",
            f"2 pairs, batch {batch}, {classes} classes",
            "pairs_of_logits",
            batch=batch,
            classes=classes,
        )
        for batch, classes in ((64, 6), (64, 309), (4096, 309))
    )
    make = staticmethod(PairsOfLogits)

    def check(self, provider: str, i: PairsOfLogits, result: Tensor) -> None:
        """Differences of logarithms of up to 10 are rounded to 1e-6, and are not that small."""
        close("divergence", result, exact(i, "kl")[0], 1e-4)

    def foreach(self, i: PairsOfLogits) -> Tensor:
        return eager_divergence(i, "kl")

    def compile(self, i: PairsOfLogits) -> Tensor:
        return _divergence(i.first, i.second, reference.KL)

    def mmfuse(self, i: PairsOfLogits, backend: str) -> Tensor:
        return ops.logit_divergence(i.first, i.second, backend=backend)


@register
class DivergenceGradients(Divergence):
    """LFM's mixture, forward, and the gradients of all logits."""

    name = "logit_divergence_grad"
    title = "logit_divergence: mixture, forward and backward"
    ops = ("logit_divergence", "logit_divergence_backward")
    passes = 3
    autograd = True

    def check(self, provider: str, i: PairsOfLogits, result: Sequence[Tensor]) -> None:
        """Compares the divergences and the gradients, which half precision rounds once."""
        value, grads = exact(i, "mixture")
        close("divergence", result[0], value, 1e-3)
        tolerance = 2 * UPDATE_TOLERANCE[i.dtype]
        for k, (got, want) in enumerate(zip(result[1:], grads, strict=True)):
            size = float(want.square().mean().sqrt())
            close(f"gradient {k}", got, want, tolerance, tolerance * size)

    def foreach(self, i: PairsOfLogits) -> tuple[Tensor, ...]:
        value = eager_divergence(i, "mixture")
        return value, *torch.autograd.grad(value.sum(), (*i.first, *i.second))

    def compile(self, i: PairsOfLogits) -> list[Tensor]:
        logits = ([z.detach() for z in logits] for logits in (i.first, i.second))
        return _with_gradients(*logits, reference.MIXTURE)

    def mmfuse(self, i: PairsOfLogits, backend: str) -> tuple[Tensor, ...]:
        value = ops.logit_divergence(i.first, i.second, kind="mixture", backend=backend)
        return value, *torch.autograd.grad(value.sum(), (*i.first, *i.second))
