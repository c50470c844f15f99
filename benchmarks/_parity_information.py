"""The gate of the estimators of information, as `_parity`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from _information_inputs import (
    CONDITIONAL_BINS,
    TEMPERATURE,
    ContrastInputs,
    FusionInputs,
    ValueInputs,
)
from _parity import ParityError, as_vector, close
from torch import Tensor

from mmfuse.methods._arm_information import released_ncmi
from mmfuse.reference import joint_entropies as reference_entropies
from mmfuse.reference import soft_histogram as reference_soft

# Results are float32; sums of entropies lose some digits where the information is small.
_TOLERANCE = 1e-5
# Shares of a value that lies between two bins, and slopes that are logarithms of small numbers.
_SOFT_TOLERANCE = 1e-3
# A value next to a bin's centre may be taken for one on its other side, where the slope is another.
_SOFT_OUTLIERS = 1e-3
# Similarities in half precision are wrong by some roundings of 1/τ, as are their exponentials.
_CONTRAST_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2.0**-6,
    torch.bfloat16: 2.0**-3,
}
_TILE = 1024


def check_information(provider: str, inputs: ValueInputs, result: Sequence[Any]) -> None:
    """Compares I, H(x), H(y) and 2·I/(H(x) + H(y)) of every problem."""
    want = inputs.cached("exact", lambda: exact_information(inputs))
    names = ("information", "entropy of x", "entropy of y", "normalised information")
    for name, got, exact in zip(names, result, want, strict=True):
        close(name, torch.as_tensor(got, device=inputs.device), exact, _TOLERANCE, _TOLERANCE)


def exact_information(inputs: ValueInputs) -> list[Tensor]:
    """From the reference's counts; the bins are those of the values' own precision."""
    rows = [inputs.x.detach(), inputs.y.detach()]
    found, _ = reference_entropies.joint_entropies(rows, [0, 1], 2, inputs.bins)
    h_x, h_y, h_xy = found[0].unbind(-1)
    mi = h_x + h_y - h_xy
    return [mi, h_x, h_y, 2 * mi / (h_x + h_y)]


def check_arm(provider: str, inputs: FusionInputs, result: Tensor | Sequence[float]) -> None:
    """Compares nmi and ncmi of both modalities, the released ncmi with its own closed form."""
    want = exact_arm(inputs.features, inputs.bins, released=provider == "official")
    close("nmi and ncmi", as_vector(result, inputs.device), want, _TOLERANCE, _TOLERANCE)


def exact_arm(features: Sequence[Tensor], bins: int, *, released: bool) -> Tensor:
    """[4], nmi of both modalities and ncmi of both, from the reference's counts."""
    rows = [feature.reshape(1, -1) for feature in features]
    pairs, _ = reference_entropies.joint_entropies(rows, [0, 2, 1, 2], 2, bins)
    h_m, h_c, h_mc = pairs[:, 0].unbind(-1)
    triple, counts = reference_entropies.joint_entropies(rows, [0, 1, 2], 3, CONDITIONAL_BINS)
    if released:
        n = counts[0, 0].view([CONDITIONAL_BINS] * 3)
        ncmi = [released_ncmi(n.permute(order)) for order in ((0, 2, 1), (1, 2, 0))]
    else:
        h_a, h_v, h_av, _, h_ac, h_vc, h_avc = triple[0, 0].unbind()
        ncmi = [
            2 * (h_mz + h_cz - h_avc - h_z) / (h_mz + h_cz - 2 * h_z)
            for h_mz, h_cz, h_z in ((h_av, h_vc, h_v), (h_av, h_ac, h_a))
        ]
    return torch.stack([*(2 * (h_m + h_c - h_mc) / (h_m + h_c)), *ncmi])


def check_soft(provider: str, inputs: ValueInputs, result: Sequence[Tensor]) -> None:
    """Compares the information and its gradients with autograd's in float64."""
    mi, *grads = result
    want, *want_grads = inputs.cached("exact", lambda: exact_soft(inputs))
    close("information", mi, want, _SOFT_TOLERANCE, _TOLERANCE)
    tolerance = _SOFT_TOLERANCE + 2 * torch.finfo(inputs.dtype).eps
    for name, values, got, exact in zip("xy", (inputs.x, inputs.y), grads, want_grads, strict=True):
        size = float(exact.square().mean().sqrt())
        off = (got.double() - exact).abs() > tolerance * (exact.abs() + size)
        off |= ~got.isfinite()
        share = float(off.double().mean())
        if share > _SOFT_OUTLIERS:
            raise ParityError(f"gradient of {name}: {share:.2%} of its elements are wrong")
        # What moves the ends of the range moves every bin, and is no outlier.
        for end in (values.argmin(), values.argmax()):
            what = f"gradient of {name} at an end of its range"
            close(what, got.flatten()[end], exact.flatten()[end], 10 * tolerance, 10 * tolerance)


def exact_soft(inputs: ValueInputs) -> list[Tensor]:
    """The information and both gradients, by autograd through the reference's forward pass."""
    with torch.enable_grad():
        x, y = (v.detach().double().requires_grad_() for v in (inputs.x, inputs.y))
        ranges = [torch.stack([v.amin(dim=1), v.amax(dim=1)], dim=1) for v in (x, y)]
        p = reference_soft.soft_histogram(x, y, *ranges, inputs.bins) / x.shape[1]
        margins = (p.sum(2), p.sum(1), p.flatten(1))
        least = torch.finfo(p.dtype).tiny
        h_x, h_y, h_xy = (torch.special.entr(q.clamp(min=least)).sum(1) for q in margins)
        mi = h_x + h_y - h_xy
        return [mi.detach(), *torch.autograd.grad(mi.sum(), (x, y))]


def check_contrast(provider: str, inputs: ContrastInputs, result: Sequence[Tensor]) -> None:
    """Compares the bound and both gradients."""
    want = inputs.cached("exact", lambda: exact_contrast(inputs))
    tolerance = _CONTRAST_TOLERANCE[inputs.dtype]
    for name, got, exact in zip(
        ("bound", "gradient of a", "gradient of b"), result, want, strict=True
    ):
        size = float(exact.square().mean().sqrt())
        close(name, got, exact, tolerance, tolerance * size)


def exact_contrast(inputs: ContrastInputs) -> list[Tensor]:
    """In float64, a block of rows at a time: the whole matrix may not fit."""
    a, b = (feature.detach().double() for feature in inputs.features)
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
