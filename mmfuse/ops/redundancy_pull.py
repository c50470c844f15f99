"""redundancy_pull: all that RedReg decides in a step, in one launch."""

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
from .grad_stats import GradStats
from .information_pull import check_compared, check_state


class RedundancyRule(NamedTuple):
    """RedReg's hyper-parameters; `mmfuse.RedReg` describes them.

    Attributes:
        momentum: Of the redundancy's moving average, in [0, 1).
        gamma: How much a growing gain counts against redundancy.
        beta: Strength of the regulation, at least 0.
        threshold: The phase above which a dominant modality is regulated.
        unbiased: True if the average is freed of the bias of its beginning at 0.
        by_encoder: True if the displacement's share along the gradient is taken of all tensors of
            an encoder together, not of each.
    """

    momentum: float = 0.9
    gamma: float = 0.6
    beta: float = 0.9
    threshold: float = 0.15
    unbiased: bool = True
    by_encoder: bool = False


class RedundancyState(NamedTuple):
    """The memory of the steps before, for M modalities and a window of W steps.

    Attributes:
        history: [M, W + 1] the last gains h_m, the latest in the last column.
        steps: [M] int64, how many there have been.
        redundancy: [M] red_m of the last step with a monitor.
        average: [M] its moving average.
        weight: [M] what the average's coefficients add up to.
    """

    history: Tensor
    steps: Tensor
    redundancy: Tensor
    average: Tensor
    weight: Tensor


class RedundancyPull(NamedTuple):
    """The decision about M modalities and T tensors.

    Attributes:
        coefficients: [M] β_m after the gate.
        growth: [M] s_m, the gain's growth rate.
        phase: [M] r_m.
        state: The state after this step, in new tensors.
        scale: [T] what `update_grads_` multiplies each gradient by; [0] without statistics.
        pull: [T] β of each tensor's modality; [0] without statistics.
    """

    coefficients: Tensor
    growth: Tensor
    phase: Tensor
    state: RedundancyState
    scale: Tensor
    pull: Tensor


def _fake(
    scores: Tensor,
    redundancy: Tensor | None,
    gate: Tensor,
    history: Tensor,
    steps: Tensor,
    last: Tensor,
    average: Tensor,
    weight: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    dot: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    state = tuple(torch.empty_like(x) for x in (history, steps, last, average, weight))
    coefficients = scores.new_empty(scores.shape[0])
    number = torch.empty_like(last), torch.empty_like(last)
    like, tensors = (scores, 0) if dot is None else (dot, owner.shape[0])
    return coefficients, *number, *state, like.new_empty(tensors), like.new_empty(tensors)


_op = Op(
    "redundancy_pull",
    "(Tensor scores, Tensor? redundancy, Tensor gate, Tensor history, Tensor steps, Tensor last,"
    " Tensor average, Tensor weight, Tensor owner, Tensor? numel, Tensor? mean, Tensor? m2,"
    " Tensor? dot, float momentum, float gamma, float beta, float threshold, bool unbiased,"
    " bool by_encoder) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def redundancy_pull(
    scores: Tensor,
    redundancy: Tensor | None,
    gate: Tensor,
    state: RedundancyState,
    rule: RedundancyRule = RedundancyRule(),  # noqa: B008
    *,
    owner: Sequence[int] = (),
    stats: GradStats | None = None,
    backend: str | None = None,
) -> RedundancyPull:
    """RedReg's growth, phase, strength and gate, its new state, and each tensor's factors.

    In float64, rounded once; one launch instead of some sixty. Not differentiable. The equations
    are in `mmfuse.RedReg`'s module, and one by one in `mmfuse/reference/redundancy_pull.py`; the
    factors are those of g + β(d − c·g) = scale·g + pull·d, with the displacement d = w − w₀ and
    c = ⟨d, g⟩ / ⟨g, g⟩.

    Equivalent to, for one tensor of each modality and a redundancy in every step::

        history = torch.cat([state.history[:, 1:], scores.unsqueeze(1)], 1)
        average = momentum * state.average + (1 - momentum) * redundancy
        past = history[:, :-1].sum(1).abs() + window * 1e-12
        growth = torch.where(steps > window, (history[:, -1] - history[:, 0]) / past, 1)
        phase = redundancy / (average / weight + 1e-12) - gamma * growth.clamp(min=0)
        ahead = scores - (scores.sum() - scores) / (M - 1)
        strength = torch.exp(beta * torch.tanh(ahead)) * gate
        pull = torch.where((scores == scores.max()) & (phase > threshold), strength, 0)
        scale = 1 - pull * stats.dot / (stats.sq_norm + 1e-12)

    Args:
        scores: [M] h_m, float32 or float64, M ≥ 2; or a table [M, M] that has in row m and column j
            the score of m over the samples that have m and j, NaN where there are none. One that is
            not finite does not enter the history.
        redundancy: [M] red_m of this step, float32 or float64; None in a step without a monitor. It
            does not enter the average where it is not finite.
        gate: 0-d, multiplies the strength.
        state: Of the steps before; float64, or float32 where the device has no float64.
        rule: The hyper-parameters.
        owner: [T] each tensor's modality. The numbers are kept on the device for later calls.
        stats: Statistics of the T gradients and of their displacements.
        backend: Name of a backend; None for the best one.

    Returns:
        `RedundancyPull`. The coefficients are like `scores`, scale and pull like the statistics,
        the rest like the state.

    Raises:
        TypeError: a dtype is wrong, or the statistics are without displacements.
        ValueError: a shape or a hyper-parameter is wrong, `owner` names no modality, or devices
            differ.
    """
    modalities = check_compared(scores)
    if not isinstance(state, RedundancyState):
        raise TypeError(f"state must be a RedundancyState, got {type(state).__name__}")
    check_rule(rule)
    check_owner(owner, modalities)
    wide = WIDE[scores.device.type]
    if not isinstance(state.history, Tensor):
        raise TypeError(f"state.history must be a tensor, got {type(state.history).__name__}")
    window = state.history.shape[1] if state.history.dim() == 2 else 0
    if window < 2:
        raise ValueError(
            f"state.history must have shape [M, W + 1] with W >= 1, got {list(state.history.shape)}"
        )
    for name, value in zip(state._fields, state, strict=True):
        dtype = torch.int64 if name == "steps" else wide
        shape = (modalities, window) if name == "history" else (modalities,)
        check_state(f"state.{name}", value, dtype, shape, scores)
    _check_number("redundancy", redundancy, (modalities,), scores)
    if gate is None:
        raise TypeError("gate must be a float32 or float64 tensor, got None")
    _check_number("gate", gate, (), scores)
    if stats is not None:
        _check_stats(stats, len(owner), scores)
    return redundancy_pull_of_checked(
        backend,
        scores.detach().contiguous(),
        redundancy,
        gate,
        RedundancyState(*(value.contiguous() for value in state)),
        rule,
        tuple(owner),
        stats,
    )


def redundancy_pull_of_checked(
    backend: str | None,
    scores: Tensor,
    redundancy: Tensor | None,
    gate: Tensor,
    state: RedundancyState,
    rule: RedundancyRule,
    owner: tuple[int, ...],
    stats: GradStats | None,
) -> RedundancyPull:
    """`redundancy_pull` of arguments that need no check; scores and state are contiguous."""
    device = scores.device
    index = kept_tensor(owner, (len(owner),), torch.int64, device, backend)
    moments: list[Tensor | None] = [None] * 4
    if stats is not None and stats.dot is not None:
        parts = stats.numel, stats.mean, stats.m2, stats.dot
        moments = [part.contiguous() for part in parts]
    if redundancy is not None:
        redundancy = redundancy.contiguous()
    found = _op(backend, device, scores, redundancy, gate, *state, index, *moments, *rule)
    coefficients, growth, phase, *after, scale, pull = found
    return RedundancyPull(coefficients, growth, phase, RedundancyState(*after), scale, pull)


def check_rule(rule: RedundancyRule) -> None:
    """Raises a ValueError for hyper-parameters out of range."""
    if not isinstance(rule, RedundancyRule):
        raise TypeError(f"rule must be a RedundancyRule, got {type(rule).__name__}")
    if not 0 <= real("momentum", rule.momentum) < 1:
        raise ValueError(f"momentum must be in [0, 1), got {rule.momentum}")
    if not (finite("beta", rule.beta) and rule.beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {rule.beta}")
    for name in ("gamma", "threshold"):
        if math.isnan(real(name, getattr(rule, name))):
            raise ValueError(f"{name} must be a number, got nan")


def _check_number(name: str, value: Tensor | None, shape: Sequence[int], scores: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor")
    check_state(name, value, value.dtype, shape, scores)


def _check_stats(stats: GradStats, count: int, scores: Tensor) -> None:
    if not isinstance(stats, GradStats) or not isinstance(stats.mean, Tensor):
        raise TypeError(f"stats must be GradStats of tensors, got {type(stats).__name__}")
    dtype = stats.mean.dtype
    if stats.dot is None or dtype not in (torch.float32, torch.float64):
        raise TypeError("stats must have displacements, and float32 or float64 moments")
    check_state("stats.numel", stats.numel, torch.int64, (count,), scores)
    for name in ("mean", "m2", "dot"):
        check_state(f"stats.{name}", getattr(stats, name), dtype, (count,), scores)
