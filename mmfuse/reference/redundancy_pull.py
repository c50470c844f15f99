"""RedReg's decision: growth, phase, strength and gate of each modality, factors of each tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._devices import WIDE
from ._example import Normal

#: Added to denominators.
EPS = 1e-12


def redundancy_pull(
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
    momentum: float,
    gamma: float,
    beta: float,
    threshold: float,
    unbiased: bool,
    by_encoder: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.redundancy_pull`.

    Coefficients, growth and phase; the new state, from history to weight; scale and pull.
    """
    wide = WIDE[scores.device.type]
    s = scores.to(wide)
    h = s.diagonal() if s.dim() == 2 else s
    counts = h.isfinite()
    later = torch.cat([history[:, 1:], h.unsqueeze(1)], dim=1)
    history = torch.where(counts.unsqueeze(1), later, history)
    steps = steps + counts
    last, average, weight = redundancies(redundancy, counts, last, average, weight, momentum)
    s_m = growth(history, steps)
    r = phase(last, average / weight if unbiased else average, s_m, gamma)
    coefficients = (strength(s, r, beta, threshold) * gate.to(wide)).to(scores.dtype)
    scale, pull = scores.new_empty(0), scores.new_empty(0)
    if dot is not None and m2 is not None and mean is not None and numel is not None:
        pull = coefficients[owner].to(dot.dtype)
        square = m2.to(wide) + mean.to(wide).square() * numel
        scale = orthogonal(pull, dot.to(wide), square, owner if by_encoder else None)
    state = history, steps, last, average, weight
    return coefficients, s_m, r, *state, scale, pull


def redundancies(
    redundancy: Tensor | None,
    counts: Tensor,
    last: Tensor,
    average: Tensor,
    weight: Tensor,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[M] red_m, its moving average, and what the average's coefficients add up to."""
    if redundancy is None:  # a step without a monitor
        return last.clone(), average.clone(), weight.clone()
    red = redundancy.to(average.dtype)
    usable = red.isfinite()
    return (
        torch.where(counts, red, last),
        torch.where(usable, momentum * average + (1.0 - momentum) * red, average),
        torch.where(usable, momentum * weight + (1.0 - momentum), weight),
    )


def growth(history: Tensor, steps: Tensor) -> Tensor:
    """[M] s_m = (h_m(t) - h_m(t-W)) / |sum of the W gains before h_m(t)|; 1 until there are W."""
    window = history.shape[1] - 1
    past = history[:, :-1].sum(dim=1).abs()
    rate = (history[:, -1] - history[:, 0]) / (past + window * EPS)
    return torch.where(steps > window, rate, 1.0)


def phase(redundancy: Tensor, average: Tensor, s: Tensor, gamma: float) -> Tensor:
    """[M] r_m = red_m / EMA(red_m) - gamma * max(s_m, 0)."""
    return redundancy / (average + EPS) - gamma * s.clamp(min=0.0)


def strength(h: Tensor, r: Tensor, beta: float, threshold: float) -> Tensor:
    """[M] exp(beta * tanh(h_m - mean of the other h)) of the modality ahead of all, if r_m > R.

    `h` is [M], or a table of them: then "others" are those that share samples with m.
    """
    compared = ~torch.eye(len(h), dtype=torch.bool, device=h.device)
    if h.dim() == 2:
        differences = h - h.T
        compared = compared & ~(h.isnan() | h.T.isnan())
    else:
        differences = h.unsqueeze(1) - h.unsqueeze(0)
    ahead = ((differences > 0) | ~compared).all(dim=1) & compared.any(dim=1)
    delta = torch.where(compared, differences, 0.0).sum(dim=1) / compared.sum(dim=1)
    return torch.where(ahead & (r > threshold), torch.exp(beta * torch.tanh(delta)), 0.0)


def orthogonal(pull: Tensor, dot: Tensor, square: Tensor, owner: Tensor | None) -> Tensor:
    """[T] 1 - beta * c, c = <d, g> / <g, g>: of each tensor, or with owners of all of an encoder.

    So that g + beta * (d - c * g) is scale * g + pull * d. 1 outright where nothing is pulled:
    there c may be anything.
    """
    if owner is not None:
        # Selected, not weighted with 0, which would spread a NaN to all encoders.
        same = owner.unsqueeze(1) == owner
        dot = torch.where(same, dot, 0.0).sum(dim=1)
        square = torch.where(same, square, 0.0).sum(dim=1)
    share = dot / (square + EPS)
    return torch.where(pull == 0, 1.0, 1.0 - pull * share).to(pull.dtype)


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    numbers = normal(3).exp(), normal(3).exp(), normal(1)[0].square().ceil()
    device = numbers[0].device
    state = [normal(3, 5).double(), torch.arange(3, device=device) + 4]
    state += [normal(3).double().exp() for _ in range(3)]
    owner = torch.tensor([0, 2, 1, 1], device=device)
    stats = owner + 5, normal(4), normal(4).exp(), normal(4)
    rule = 0.9, 0.6, 0.9, 0.15, True, False
    return {"redundancy_pull": (*numbers, *state, owner, *stats, *rule)}
