"""`mutual_information(estimator="soft")`: differentiable, with shares instead of counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from engine.case import Case, register
from engine.compiled import compiled
from engine.gate import ParityError, close
from engine.inputs import wide_of
from engine.workloads import Workload
from torch import Tensor

from mmfuse import ops
from mmfuse.reference import soft_histogram as reference

from .mutual_information import TOLERANCE, ValueInputs, entropy

# Shares of a value that lies between two bins, and slopes that are logarithms of small numbers.
_TOLERANCE = 1e-3
# A value next to a bin's centre may be taken for one on its other side, where the slope is another.
_OUTLIERS = 1e-3


def exact_soft(i: ValueInputs) -> list[Tensor]:
    """The information and both gradients, by autograd through the reference's forward pass."""
    with torch.enable_grad():
        x, y = (v.detach().double().requires_grad_() for v in (i.x, i.y))
        mi = _information(x, y, i.bins)
        return [mi.detach(), *torch.autograd.grad(mi.sum(), (x, y))]


def _information(x: Tensor, y: Tensor, bins: int) -> Tensor:
    wider = (v.to(wide_of(x.dtype)) for v in (x, y))
    ranges = [torch.stack([v.amin(dim=1), v.amax(dim=1)], dim=1) for v in wider]
    p = reference.soft_histogram(x, y, *ranges, bins) / x.shape[1]
    parts = [p.sum(2), p.sum(1), p.flatten(1)]
    least = torch.finfo(p.dtype).tiny
    h_x, h_y, h_xy = (torch.special.entr(q.clamp(min=least)).sum(1) for q in parts)
    return h_x + h_y - h_xy


_compiled_information = compiled(dynamic=False)(_information)


def _shares(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The lower of both bins of each value of the row, and what each of both bins gets."""
    low, high = x.amin(), x.amax()
    t = (x - low) * ((bins - 1) / (high - low))
    lower = t.detach().long().clamp_(max=bins - 2)
    return lower, torch.stack([lower + 1 - t, t - lower])


def _eager_information(i: ValueInputs) -> Tensor:
    """The best eager form; a product of two [N, bins] matrices took longer, on the CPU."""
    x, y = (v[0] if v.dtype == torch.float64 else v[0].float() for v in (i.x, i.y))
    (first, x_shares), (second, y_shares) = _shares(x, i.bins), _shares(y, i.bins)
    cell = first * i.bins + second
    cells = torch.stack([cell, cell + 1, cell + i.bins, cell + i.bins + 1])
    weights = (x_shares.unsqueeze(1) * y_shares).flatten()
    p = weights.new_zeros(i.bins**2).scatter_add(0, cells.flatten(), weights) / len(x)
    # The slope of −p log p is infinite at 0.
    p = p.clamp(min=torch.finfo(p.dtype).tiny).view(1, i.bins, i.bins)
    return entropy(p, 2) + entropy(p, 1) - entropy(p)


@register
class SoftInformation(Case):
    """Forward and backward; no release has it."""

    name = "soft_information"
    title = "mutual_information, soft: forward and backward"
    kind = "few_pairs"
    ops = ("soft_entropies", "soft_entropies_backward")
    passes = 3
    autograd = True
    workloads = (Workload("pairs_32k", "32,768 pairs, 30 bins", "few_pairs", shape=(1, 2**15)),)
    make = staticmethod(ValueInputs)

    def check(self, provider: str, i: ValueInputs, result: Sequence[Tensor]) -> None:
        """Compares the information and its gradients with autograd's in float64."""
        mi, *grads = result
        want, *want_grads = i.cached("exact", lambda: exact_soft(i))
        close("information", mi, want, _TOLERANCE, TOLERANCE)
        tolerance = _TOLERANCE + 2 * torch.finfo(i.dtype).eps
        for name, values, got, exact in zip("xy", (i.x, i.y), grads, want_grads, strict=True):
            size = float(exact.square().mean().sqrt())
            off = (got.double() - exact).abs() > tolerance * (exact.abs() + size)
            off |= ~got.isfinite()
            share = float(off.double().mean())
            if share > _OUTLIERS:
                raise ParityError(f"gradient of {name}: {share:.2%} of its elements are wrong")
            # The ends of the range move every bin, and are no outliers.
            for end in (values.argmin(), values.argmax()):
                what = f"gradient of {name} at an end of its range"
                close(
                    what, got.flatten()[end], exact.flatten()[end], 10 * tolerance, 10 * tolerance
                )

    def foreach(self, i: ValueInputs) -> tuple[Tensor, ...]:
        mi = _eager_information(i)
        return mi, *torch.autograd.grad(mi, (i.x, i.y))

    def compile(self, i: ValueInputs) -> tuple[Tensor, ...]:
        mi = _compiled_information(i.x, i.y, i.bins)
        return mi, *torch.autograd.grad(mi, (i.x, i.y))

    def mmfuse(self, i: ValueInputs, backend: str) -> tuple[Tensor, ...]:
        mi = ops.mutual_information(i.x, i.y, i.bins, "soft", backend=backend).mi
        return mi, *torch.autograd.grad(mi, (i.x, i.y))


@register
class SoftForward(SoftInformation):
    """The information alone."""

    name = "soft_information_forward"
    title = "mutual_information, soft"
    ops = ("soft_entropies",)
    passes = 1
    autograd = False
    named_only = True
    workloads = ()

    def check(self, provider: str, i: ValueInputs, result: Tensor) -> None:
        """Compares the information."""
        want, *_ = i.cached("exact", lambda: exact_soft(i))
        close("information", result, want, _TOLERANCE, TOLERANCE)

    def foreach(self, i: ValueInputs) -> Tensor:
        return _eager_information(i)

    def compile(self, i: ValueInputs) -> Tensor:
        return _compiled_information(i.x, i.y, i.bins)

    def mmfuse(self, i: ValueInputs, backend: str) -> Tensor:
        return ops.mutual_information(i.x, i.y, i.bins, "soft", backend=backend).mi
