"""`info_nce`: the symmetric InfoNCE bound and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import close
from engine.inputs import COSINE, Inputs
from engine.workloads import Workload
from torch import Tensor
from torch.nn import functional as F

from mmfuse import ops
from mmfuse.reference import info_nce as reference

TEMPERATURE = 0.1
# Similarities in half precision are wrong by some roundings of 1/τ, as are their exponentials.
_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2.0**-6,
    torch.bfloat16: 2.0**-3,
}
_TILE = 1024


class ContrastInputs(Inputs):
    """Rows of unit length, whose partners have `COSINE` with them."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, dtype, device)
        shape = (workload.batch, workload.width)
        a, other = (F.normalize(self._randn(shape, 1.0), dim=1) for _ in range(2))
        b = F.normalize(COSINE * a + (1 - COSINE**2) ** 0.5 * other, dim=1)
        self.features = [feature.requires_grad_() for feature in (a, b)]
        self.nbytes = sum(feature.nbytes for feature in self.features)


def exact_contrast(i: ContrastInputs) -> list[Tensor]:
    """The numbers in float64, a block of rows at a time: the whole matrix may not fit."""
    a, b = (feature.detach().double() for feature in i.features)
    blocks = range(0, len(a), _TILE)

    def similarity(start: int) -> Tensor:
        return a[start : start + _TILE] @ b.T / TEMPERATURE

    row_sums, columns = [], torch.full_like(a[:, 0], -torch.inf)
    for start in blocks:
        s = similarity(start)
        row_sums.append(s.logsumexp(1))
        columns = torch.logaddexp(columns, s.logsumexp(0))
    rows = torch.cat(row_sums)
    partners = (a * b).sum(1) / TEMPERATURE
    bound = (partners - (rows + columns) / 2).mean() + math.log(len(a))
    grad_a, grad_b = b / TEMPERATURE, a / TEMPERATURE
    for start in blocks:
        s = similarity(start)
        here = slice(start, start + _TILE)
        softmaxes = ((s - rows[here, None]).exp() + (s - columns).exp()) / (2 * TEMPERATURE)
        grad_a[here] -= softmaxes @ b
        grad_b -= softmaxes.T @ a[here]
    return [bound, grad_a / len(a), grad_b / len(a)]


@compiled(dynamic=False)
def _contrast(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    return reference.info_nce(a, b, temperature)[0]


def released_bound(i: ContrastInputs) -> Tensor:
    """The bound as people write it."""
    a, b = i.features
    similarity = a @ b.t() / TEMPERATURE
    partner = torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.t(), partner)
    return math.log(len(a)) - loss / 2


def eager_bound(i: ContrastInputs) -> Tensor:
    """Two cross entropies, of S and of its transpose, took a tenth longer on the CPU."""
    a, b = i.features
    a, b = (a, b) if a.dtype == torch.float64 else (a.float(), b.float())
    similarity = a @ (b / TEMPERATURE).T
    sums = (similarity.logsumexp(1) + similarity.logsumexp(0)) / 2
    return (similarity.diagonal() - sums).mean() + math.log(len(a))


def compiled_bound(i: ContrastInputs) -> Tensor:
    """The bound of the compiled reference."""
    temperature = i.cached("temperature", lambda: torch.tensor(TEMPERATURE, device=i.device))
    return _contrast(*i.features, temperature)


@register
class Contrast(Case):
    """Forward and backward; `official` is what people write, two cross entropies."""

    name = "info_nce"
    title = "info_nce: forward and backward"
    kind = "contrast"
    ops = ("info_nce", "info_nce_backward")
    # The products take the time, not the bytes.
    passes = 0
    autograd = True
    workloads = (
        Workload("contrast_1024", "pairs of features 1024×512", "contrast", batch=1024),
        Workload("contrast_8192", "pairs of features 8192×512", "contrast", batch=8192),
    )
    make = staticmethod(ContrastInputs)

    def check(self, provider: str, i: ContrastInputs, result: Sequence[Tensor]) -> None:
        """Compares the bound and both gradients."""
        want = i.cached("exact", lambda: exact_contrast(i))
        tolerance = _TOLERANCE[i.dtype]
        names = ("bound", "gradient of a", "gradient of b")
        for name, got, exact in zip(names, result, want, strict=True):
            size = float(exact.square().mean().sqrt())
            close(name, got, exact, tolerance, tolerance * size)

    def official(self, i: ContrastInputs) -> tuple[Tensor, ...]:
        bound = released_bound(i)
        return bound, *torch.autograd.grad(bound, i.features)

    def foreach(self, i: ContrastInputs) -> tuple[Tensor, ...]:
        bound = eager_bound(i)
        return bound, *torch.autograd.grad(bound, i.features)

    def compile(self, i: ContrastInputs) -> tuple[Tensor, ...]:
        bound = compiled_bound(i)
        return bound, *torch.autograd.grad(bound, i.features)

    def mmfuse(self, i: ContrastInputs, backend: str) -> tuple[Tensor, ...]:
        bound = ops.info_nce(*i.features, TEMPERATURE, backend=backend)
        return bound, *torch.autograd.grad(bound, i.features)


@register
class ContrastForward(Contrast):
    """The bound alone."""

    name = "info_nce_forward"
    title = "info_nce"
    ops = ("info_nce",)
    autograd = False
    named_only = True
    workloads = ()

    def check(self, provider: str, i: ContrastInputs, result: Tensor) -> None:
        """Compares the bound."""
        want = i.cached("exact", lambda: exact_contrast(i))[0]
        tolerance = _TOLERANCE[i.dtype]
        close("bound", result, want, tolerance, tolerance * float(want.abs()))

    def official(self, i: ContrastInputs) -> Tensor:
        return released_bound(i)

    def foreach(self, i: ContrastInputs) -> Tensor:
        return eager_bound(i)

    def compile(self, i: ContrastInputs) -> Tensor:
        return compiled_bound(i)

    def mmfuse(self, i: ContrastInputs, backend: str) -> Tensor:
        return ops.info_nce(*i.features, TEMPERATURE, backend=backend)
