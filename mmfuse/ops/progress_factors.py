"""progress_factors: all that CGGM decides in a step, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import finite, real
from ._arguments import check_owner
from ._registry import Op
from ._tensors import kept_tensor
from .information_pull import check_compared, check_state

_DTYPES = (torch.float32, torch.float64)


class ProgressFactors(NamedTuple):
    """The decision about M modalities and T tensors; all but `scale` are like `last_scores`.

    Attributes:
        coefficients: [M] ρ·k_m; 1 for a modality without another to compare with.
        progress: [M] Δ_m, the scores less the last ones.
        shares: [M] k_m, at most `bound` in size; NaN for a modality without another.
        scale: [T] the coefficient of each tensor's modality, float32 or float64.
        kept_scores: [M, M] the next step's `last_scores`.
        kept_shares: [M] the shares, and the last ones where there are none.
    """

    coefficients: Tensor
    progress: Tensor
    shares: Tensor
    scale: Tensor
    kept_scores: Tensor
    kept_shares: Tensor


def _fake(
    scores: Tensor,
    last_scores: Tensor,
    last_shares: Tensor,
    owner: Tensor,
    rho: float,
    bound: float,
    wide_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = scores.shape[0]
    coefficients, progress, shares, kept = (last_scores.new_empty(number) for _ in range(4))
    dtype = WIDE[owner.device.type] if wide_scale else torch.float32
    scale = owner.new_empty(owner.shape[0], dtype=dtype)
    return coefficients, progress, shares, scale, last_scores.new_empty(number, number), kept


_op = Op(
    "progress_factors",
    "(Tensor scores, Tensor last_scores, Tensor last_shares, Tensor owner, float rho, float bound,"
    " bool wide_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def progress_factors(
    scores: Tensor,
    last_scores: Tensor,
    last_shares: Tensor,
    rho: float,
    bound: float | None = None,
    *,
    owner: Sequence[int] = (),
    scale_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> ProgressFactors:
    """CGGM's progress, shares and coefficients (NeurIPS 2024), and each tensor's factor.

    Δ_m is what modality m has gained since the last step, and k_m the other modalities' share in
    what all have gained: (Σ_j Δ_j − Δ_m + ε) / (Σ_j Δ_j + ε) with ε = 1e-8. One that gains much is
    slowed. In float64, rounded once; one launch instead of two dozen. Not differentiable.

    Equivalent to, for [M] scores::

        progress = scores - last_scores.diagonal()
        shares = ((progress.sum() - progress + 1e-8) / (progress.sum() + 1e-8)).clamp(-bound, bound)
        coefficients = rho * shares
        kept_scores = scores.unsqueeze(1).expand_as(last_scores)
        coefficients, progress, shares, coefficients[owner], kept_scores, shares

    Args:
        scores: [M] e_m, larger is better, float32 or float64, M ≥ 2; or a table [M, M] that has in
            row m and column j the score of m over the samples that have m and j, NaN where there
            are none: then two modalities are compared over those, and Δ_m in k_m is the mean over
            the others.
        last_scores: [M, M] such a table of the step before, float32 or float64; zeros at first.
        last_shares: [M] those of the step before, of the same dtype.
        rho: Factor ρ on all coefficients, positive.
        bound: The largest |k_m|, at least 1; None for no bound.
        owner: [T] each tensor's modality. The numbers are kept on the device for later calls.
        scale_dtype: Of `scale`, float32 or float64, which `update_grads_` takes for such gradients
            as it is; None for that of `last_scores`.
        backend: Name of a backend; None for the best one.

    Returns:
        `ProgressFactors`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, `owner` names no modality, devices differ, `rho` is not
            positive and finite, or `bound` is below 1.
    """
    modalities = check_compared(scores)
    check_owner(owner, modalities)
    check_progress(rho, bound)
    dtype = getattr(last_scores, "dtype", None)
    if dtype not in _DTYPES:
        raise TypeError("last_scores must be a float32 or float64 tensor")
    if scale_dtype is not None and scale_dtype not in _DTYPES:
        raise TypeError(f"scale_dtype must be torch.float32 or torch.float64, got {scale_dtype}")
    check_state("last_scores", last_scores, dtype, (modalities, modalities), scores)
    check_state("last_shares", last_shares, dtype, (modalities,), scores)
    now, last, shares = (x.detach().contiguous() for x in (scores, last_scores, last_shares))
    limit = math.inf if bound is None else float(bound)
    scale = scale_dtype or dtype
    return progress_of_checked(backend, now, last, shares, tuple(owner), float(rho), limit, scale)


def progress_of_checked(
    backend: str | None,
    scores: Tensor,
    last_scores: Tensor,
    last_shares: Tensor,
    owner: tuple[int, ...],
    rho: float,
    bound: float,
    scale_dtype: torch.dtype,
) -> ProgressFactors:
    """`progress_factors` of arguments that need no check: contiguous, on one device."""
    device = scores.device
    index = kept_tensor(owner, (len(owner),), torch.int64, device, backend)
    wide = scale_dtype is torch.float64
    found = _op(backend, device, scores, last_scores, last_shares, index, rho, bound, wide)
    return ProgressFactors(*found)


def check_progress(rho: float, bound: float | None) -> None:
    """Raises a ValueError for hyper-parameters of CGGM that are out of range."""
    if not (finite("rho", rho) and rho > 0):
        raise ValueError(f"rho must be a positive finite number, got {rho}")
    if bound is not None and not real("bound", bound) >= 1:
        raise ValueError(f"bound must be at least 1, or None for no bound, got {bound}")
