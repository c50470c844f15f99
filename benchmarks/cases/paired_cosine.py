"""`paired_cosine`: mean cosine of paired rows, without the B × B product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine import sequences
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import UPDATE_TOLERANCE, close
from engine.inputs import COSINE, Inputs, wide_of
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import paired_cosine as reference

#: The gate's limit in the first epoch.
AGREEMENT = 0.2


class PairInputs(Inputs):
    """Features of two modalities whose rows have `COSINE` with each other, and the gate's limit."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        a, other = (self._randn(shape, 1.0) for _ in range(2))
        b = COSINE * a + (1 - COSINE**2) ** 0.5 * other
        self.features = [feature.requires_grad_() for feature in (a, b)]
        self.threshold = torch.tensor(AGREEMENT, dtype=wide_of(dtype), device=device)
        self.nbytes = sum(feature.nbytes for feature in self.features)


def exact_cosine(i: PairInputs) -> Tensor:
    """The mean cosine in float64."""
    return reference.paired_cosine(*(f.detach().double() for f in i.features))


def eager_cosine(i: PairInputs) -> Tensor:
    """F.cosine_similarity takes twice as long: it normalises both before it multiplies."""
    a, b = i.features
    norms = [torch.linalg.vector_norm(feature, dim=1) for feature in (a, b)]
    return ((a * b).sum(dim=1) / (norms[0] * norms[1])).mean()


@compiled(dynamic=False)
def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return reference.paired_cosine(a, b)


@register
class Cosine(Case):
    """Forward."""

    name = "paired_cosine"
    title = "paired_cosine"
    kind = "features"
    ops = ("paired_cosine",)
    passes = 1
    make = staticmethod(PairInputs)

    def check(self, provider: str, i: PairInputs, result: Tensor) -> None:
        """Compares the mean cosine; the error of each row's is at most some roundings of one."""
        close("cosine", result, exact_cosine(i), 0.0, 1e-4 + 2 * torch.finfo(i.dtype).eps)

    def official(self, i: PairInputs) -> Tensor:
        return sequences.redreg.all_pairs_cosine(*i.features)

    def foreach(self, i: PairInputs) -> Tensor:
        return eager_cosine(i)

    def compile(self, i: PairInputs) -> Tensor:
        return _cosine(*i.features)

    def mmfuse(self, i: PairInputs, backend: str) -> Tensor:
        return ops.paired_cosine(*i.features, backend=backend)


@register
class CosineGradients(Cosine):
    """Forward and backward, as a loss takes it."""

    name = "paired_cosine_grad"
    title = "paired_cosine: forward and backward"
    ops = ("paired_cosine", "paired_cosine_backward")
    passes = 3
    autograd = True

    def check(self, provider: str, i: PairInputs, result: Sequence[Tensor]) -> None:
        """Compares both gradients of the mean cosine."""
        one = torch.ones((), dtype=torch.float64, device=i.device)
        want = reference.paired_cosine_backward(one, *(f.detach().double() for f in i.features))
        # Eager half-precision code rounds a dozen times on the way, twice as often as in an update.
        tolerance = 2 * UPDATE_TOLERANCE[i.dtype]
        for name, got, w in zip("ab", result, want, strict=True):
            size = float(w.square().mean().sqrt())
            close(f"gradient of {name}", got, w, tolerance, tolerance * size)

    def official(self, i: PairInputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(super().official(i), i.features)

    def foreach(self, i: PairInputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(super().foreach(i), i.features)

    def compile(self, i: PairInputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(super().compile(i), i.features)

    def mmfuse(self, i: PairInputs, backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(super().mmfuse(i, backend), i.features)
