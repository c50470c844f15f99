"""modulation_factors: all that OGM, OGM-GE and MLB decide, in one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._numbers import finite, real
from ..reference.modulation_factors import CVPR, MLB, TPAMI
from ._arguments import check_owner
from ._eager import Eager
from ._registry import Op
from ._tensors import check_dense, kept_tensor
from .discrepancy_ratios import check_scores
from .grad_stats import GradStats

#: OGM's formulas.
Formula = Literal["tpami", "cvpr"]
#: The place of each formula, which the operators take.
_PLACES = {"tpami": TPAMI, "cvpr": CVPR, "mlb": MLB}
_EAGERLY = Eager("")


class ModulationFactors(NamedTuple):
    """The decision about M modalities and T tensors.

    Attributes:
        ratios: [M] ρ_m.
        coefficients: [M] k_m.
        scale: [T] the coefficient of each tensor's modality.
        noise_std: [T] standard deviation of each tensor's noise; None without statistics.
    """

    ratios: Tensor
    coefficients: Tensor
    scale: Tensor
    noise_std: Tensor | None


class Started(NamedTuple):
    """The beginning of the update that follows, made in the decision's launch.

    Attributes:
        finite: 0-d bool, True.
        done: [1] int32, how many of the update's blocks are done: 0; None on the CPU, and where the
            decision takes no statistics.
    """

    finite: Tensor
    done: Tensor | None = None


def _fake(
    scores: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    m2: Tensor | None,
    alpha: float,
    beta: float,
    formula: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    modalities, tensors = scores.shape[0], owner.shape[0]
    like, noisy = (scores, 0) if m2 is None else (m2, tensors)
    ratios, coefficients = scores.new_empty(modalities), scores.new_empty(modalities)
    return ratios, coefficients, like.new_empty(tensors), like.new_empty(noisy)


_op = Op(
    "modulation_factors",
    "(Tensor scores, Tensor owner, Tensor? numel, Tensor? m2, float alpha, float beta,"
    " int formula, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    table="(Tensor? table, Tensor scores, Tensor owner, float alpha, float beta, int formula,"
    " float eps) -> Tensor[]",
)


def modulation_factors(
    scores: Tensor,
    alpha: float,
    formula: Formula | Literal["mlb"] = "tpami",
    *,
    beta: float = 2.0,
    owner: Sequence[int] = (),
    stats: GradStats | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> ModulationFactors:
    """Ratios and coefficients of modalities; factor and noise of each tensor.

    The formulas are those of OGM, in `discrepancy_ratios` and `mmfuse.ogm_coefficients`, or of MLB,
    and of `GradStats.std`, in float64 and rounded once; here they are one launch instead of a
    dozen. Not differentiable.

    Equivalent to::

        ratios = discrepancy_ratios(scores)
        coefficients = mmfuse.ogm_coefficients(ratios, alpha, formula)
        scale = coefficients[owner]
        noise_std = torch.where(stats.numel > 1, stats.std + eps, 0)

    and with ``formula="mlb"`` (Kontras et al., BMVC 2024), whose ratio is above 1 for a modality
    that is behind, to::

        ratios = (scores.sum() - scores) / (M - 1) / scores
        change = torch.tanh(alpha * (ratios - 1))
        coefficients = 1 + torch.where(ratios > 1, (beta - 1) * change, change)

    Args:
        scores: [M] non-negative scores, float32 or float64, M ≥ 2.
        alpha: Strength, at least 0.
        formula: "tpami" (TPAMI Eq. 11), "cvpr" (CVPR Eq. 10) or "mlb".
        beta: The largest coefficient of a modality that is behind, at least 0; for "mlb" only.
        owner: [T] each tensor's modality. The numbers are kept on the device for later calls.
        stats: Statistics of the T tensors, for their noise.
        eps: Is added to the standard deviations.
        backend: Name of a backend; None for the best one.

    Returns:
        `ModulationFactors`. Ratios and coefficients are like `scores`, as is `scale` without
        `stats`; with them the [T] are like `stats.m2`. A ratio that is NaN has the coefficient 1;
        so has, but for "mlb", one that is at most 1, and every one for alpha = 0. A tensor of one
        element has no noise.

    Raises:
        TypeError: `scores` or the statistics are not float32 or float64.
        ValueError: a shape is wrong, `owner` names no modality, devices differ, `alpha` or `beta`
            is negative or not finite, or there is no such formula.
    """
    check_scores(scores)
    check_strength(alpha, formula, (*_PLACES,))
    if not (finite("beta", beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    modalities = scores.shape[0]
    check_owner(owner, modalities)
    if type(eps) is not float:
        eps = real("eps", eps)
    if stats is not None:
        _check_stats(stats, len(owner), scores)
    scores = scores.detach().contiguous()
    return factors_of_checked(
        backend, scores, alpha, formula, tuple(owner), stats, eps, beta=float(beta)
    )


def factors_of_checked(
    backend: str | None,
    scores: Tensor,
    alpha: float,
    formula: str,
    owner: tuple[int, ...],
    stats: GradStats | None,
    eps: float,
    *,
    beta: float = 0.0,
) -> ModulationFactors:
    """`modulation_factors` of arguments that need no check; `scores` are contiguous."""
    device = scores.device
    index = kept_tensor(owner, (len(owner),), torch.int64, device, backend)
    numel = m2 = None
    if stats is not None:
        numel, m2 = stats.numel.contiguous(), stats.m2.contiguous()
    found = _op(backend, device, scores, index, numel, m2, alpha, beta, _PLACES[formula], eps)
    ratios, coefficients, scale, noise = found
    return ModulationFactors(ratios, coefficients, scale, None if stats is None else noise)


def before_update(backend: str | None, device: torch.device) -> Callable[..., Any] | None:
    """The kernel of `factors_before_update`, eagerly and of a compiled backend; else None."""
    return _op.of_table(backend, device) if type(backend) is Eager else None


def factors_before_update(
    kernel: Callable[..., Any],
    scores: Tensor,
    alpha: float,
    formula: str,
    owner: tuple[int, ...],
    table: Tensor | None,
    eps: float,
    *,
    beta: float = 0.0,
) -> tuple[ModulationFactors, Started]:
    """`factors_of_checked`, and what the update starts from.

    `kernel` is `before_update`'s. `table` is what `mmfuse._native.read_gradients` has made of the
    gradients, for their statistics, which are taken on the way; None for no noise.
    """
    index = kept_tensor(owner, (len(owner),), torch.int64, scores.device, _EAGERLY)
    with torch._C._AutoDispatchBelowAutograd():
        found = kernel(table, scores, index, alpha, beta, _PLACES[formula], eps)
    ratios, coefficients, scale, finite = found[:4]
    noise = found[4] if table is not None else None
    done = found[5] if len(found) > 5 else None
    return ModulationFactors(ratios, coefficients, scale, noise), Started(finite, done)


def noise_std(stats: GradStats, eps: float) -> Tensor:
    """[T] standard deviation of each tensor's noise, as `ModulationFactors` has it."""
    return torch.where(stats.numel > 1, stats.std + eps, 0)


def check_strength(alpha: float, formula: str, formulas: Sequence[str] = ("tpami", "cvpr")) -> None:
    """Raises a ValueError for hyper-parameters of OGM that are out of range."""
    if type(alpha) is not float:
        alpha = real("alpha", alpha)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    if formula not in formulas:
        *others, last = map(repr, formulas)
        raise ValueError(f"formula must be {', '.join(others)} or {last}, got {formula!r}")


def _check_stats(stats: GradStats, count: int, scores: Tensor) -> None:
    if not isinstance(stats, GradStats):
        raise TypeError(f"stats must be GradStats, got {type(stats).__name__}")
    if not (isinstance(stats.numel, Tensor) and isinstance(stats.m2, Tensor)):
        raise TypeError("stats must hold tensors")
    if stats.numel.dtype != torch.int64 or stats.m2.dtype not in (torch.float32, torch.float64):
        raise TypeError("stats must hold int64 numbers and float32 or float64 moments")
    for name, value in (("numel", stats.numel), ("m2", stats.m2)):
        check_dense(f"stats.{name}", value)
        if value.shape != (count,):
            raise ValueError(
                f"stats.{name} must have shape [{count}], one for each entry of owner, "
                f"got {list(value.shape)}"
            )
        if value.device != scores.device:
            raise ValueError(f"stats.{name} is on {value.device}, scores on {scores.device}")
