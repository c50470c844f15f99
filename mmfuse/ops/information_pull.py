"""information_pull: all that InfoReg decides in a step, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import real
from ._arguments import check_owner, check_sequence
from ._registry import Op
from ._tensors import check_dense, kept_tensor


class InformationPull(NamedTuple):
    """The decision about M modalities and T tensors.

    Attributes:
        coefficients: [M] α_m; 0 where nothing is regulated.
        gap: [M] Δ_m, float64 where the device has it.
        steps: [M] int64, the steps in which some sample had the modality.
        scale: [T] ones: what `update_grads_` multiplies each gradient by.
        pull: [T] α of each tensor's modality.
    """

    coefficients: Tensor
    gap: Tensor
    steps: Tensor
    scale: Tensor
    pull: Tensor


def _fake(
    scores: Tensor,
    count: Tensor | None,
    window_open: Tensor,
    steps: Tensor,
    owner: Tensor,
    beta: float,
    multipliers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    modalities, tensors = scores.shape[0], owner.shape[0]
    return (
        scores.new_empty(modalities),
        scores.new_empty(modalities, dtype=WIDE[scores.device.type]),
        steps.new_empty(modalities),
        scores.new_empty(tensors),
        scores.new_empty(tensors),
    )


_op = Op(
    "information_pull",
    "(Tensor scores, Tensor? count, Tensor window_open, Tensor steps, Tensor owner, float beta,"
    " Tensor? multipliers) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def information_pull(
    scores: Tensor,
    window_open: Tensor,
    steps: Tensor,
    beta: float,
    *,
    owner: Sequence[int] = (),
    count: Tensor | None = None,
    multipliers: Sequence[float] = (),
    backend: str | None = None,
) -> InformationPull:
    """InfoReg's information gap and strength (CVPR 2025, Eq. 9-16), and each tensor's pull.

    Δ_m = mean of s_m − s_j over the modalities j that are behind m, 0 if there are none, and
    α_m = exp(β tanh Δ_m) where the window is open and Δ_m > 0, else 0. In float64, rounded once;
    one launch instead of two dozen. Not differentiable.

    Equivalent to, for [M] scores::

        differences = scores.unsqueeze(1) - scores.unsqueeze(0)
        behind = differences > 0
        gap = torch.where(behind, differences, 0).sum(1) / behind.sum(1).clamp(min=1)
        alpha = torch.where(window_open & (gap > 0), torch.exp(beta * torch.tanh(gap)), 0)
        alpha, gap, steps + 1, torch.ones_like(alpha[owner]), alpha[owner]

    Args:
        scores: [M] s_m, larger is better, float32 or float64, M ≥ 2; or a table [M, M] that has in
            row m and column j the score of m over the samples that have m and j, NaN where there
            are none: then two modalities are compared over those.
        window_open: [M] bool.
        steps: [M] int64; 1 is added, in a table for the modalities that some sample has.
        beta: Strength β, at least 0.
        owner: [T] each tensor's modality. The numbers are kept on the device for later calls.
        count: Multiplies the scores: 0-d, or of their shape; None for 1.
        multipliers: [M] factors of exp(β tanh Δ_m), as the released code has; none for 1.
        backend: Name of a backend; None for the best one.

    Returns:
        `InformationPull`; coefficients, scale and pull are like `scores`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, `owner` names no modality, devices differ, or `beta` is
            negative or not finite.
    """
    modalities = check_compared(scores)
    if type(beta) is not float:
        beta = real("beta", beta)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    check_owner(owner, modalities)
    for name, value, dtype in (
        ("window_open", window_open, torch.bool),
        ("steps", steps, torch.int64),
    ):
        check_state(name, value, dtype, (modalities,), scores)
    if count is not None:
        if not isinstance(count, Tensor) or count.is_complex():
            raise TypeError("count must be a tensor of real numbers")
        check_state("count", count, count.dtype, count.shape and scores.shape, scores)
        count = count.detach().to(WIDE[scores.device.type]).contiguous()
    if not isinstance(multipliers, (list, tuple)):
        check_sequence("multipliers", multipliers, "numbers")
    multipliers = [real(f"multipliers[{m}]", x) for m, x in enumerate(multipliers)]
    if len(multipliers) not in (0, modalities):
        raise ValueError(f"multipliers must have {modalities} numbers, got {len(multipliers)}")
    return pull_of_checked(
        backend,
        scores.detach().contiguous(),
        count,
        window_open.contiguous(),
        steps.contiguous(),
        tuple(owner),
        beta,
        tuple(multipliers),
    )


def pull_of_checked(
    backend: str | None,
    scores: Tensor,
    count: Tensor | None,
    window_open: Tensor,
    steps: Tensor,
    owner: tuple[int, ...],
    beta: float,
    multipliers: tuple[float, ...] = (),
) -> InformationPull:
    """`information_pull` of arguments that need no check: contiguous, on one device."""
    device = scores.device
    index = kept_tensor(owner, (len(owner),), torch.int64, device, backend)
    factors = None
    if multipliers:
        shape, wide = (len(multipliers),), WIDE[device.type]
        factors = kept_tensor(multipliers, shape, wide, device, backend)
    found = _op(backend, device, scores, count, window_open, steps, index, beta, factors)
    return InformationPull(*found)


def check_compared(scores: Tensor) -> int:
    """M, of scores [M] or a table [M, M] of them; raises an error for anything else."""
    if not isinstance(scores, Tensor) or scores.dtype not in (torch.float32, torch.float64):
        raise TypeError("scores must be a float32 or float64 tensor")
    check_dense("scores", scores)
    modalities = scores.shape[0] if scores.dim() else 0
    if modalities < 2 or scores.shape not in ((modalities,), (modalities, modalities)):
        raise ValueError(
            f"scores must have shape [M] or [M, M] with M >= 2, got {list(scores.shape)}"
        )
    return modalities


def check_state(
    name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int], scores: Tensor
) -> None:
    """Checks a tensor of a method's state."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype}")
    check_dense(name, value)
    if value.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.device != scores.device:
        raise ValueError(f"{name} is on {value.device}, scores on {scores.device}")
