"""RedReg's equations, one function each, on tiny tensors: they read and change nothing else.

`mmfuse.methods.redreg` has the paper. M is the number of modalities, W the window of the growth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._numbers import whole
from ..loop.pairs import ahead

#: Added to denominators.
EPS = 1e-12


def history(
    old: Mapping[str, Tensor], h: Tensor, redundancy: Tensor | None, momentum: float
) -> dict[str, Tensor]:
    """The parts of the state that a step changes, as new tensors.

    ::

        scores  <- the last W + 1 of h_m, the latest in the last column
        average <- momentum * average + (1 - momentum) * red_m

    A score that is not finite, as that of a modality that is missing, does not enter the one, a
    redundancy that is not finite does not enter the other.

    Args:
        old: "scores" [M, W + 1], "steps" [M] in them, "redundancy" [M] of the last step with a
            monitor, "average" [M] of it, and "average_weight" [M], the sum of the average's
            coefficients.
        h: [M] h_m of this step.
        redundancy: [M] red_m of this step; None in a step without a monitor.
        momentum: Of the average.
    """
    h = h.to(old["scores"])
    counts = h.isfinite()
    later = torch.cat([old["scores"][:, 1:], h.unsqueeze(1)], dim=1)
    new = {
        "scores": torch.where(counts.unsqueeze(1), later, old["scores"]),
        "steps": old["steps"] + counts,
    }
    if redundancy is None:
        return {**new, **{key: old[key] for key in ("redundancy", "average", "average_weight")}}
    average = momentum * old["average"] + (1.0 - momentum) * redundancy
    weight = momentum * old["average_weight"] + (1.0 - momentum)
    usable = redundancy.isfinite()
    new["redundancy"] = torch.where(counts, redundancy, old["redundancy"])
    new["average"] = torch.where(usable, average, old["average"])
    new["average_weight"] = torch.where(usable, weight, old["average_weight"])
    return new


def growth(scores: Tensor, steps: Tensor) -> Tensor:
    """[M] s_m = (h_m(t) - h_m(t-W)) / |sum of the W gains before h_m(t)|; 1 until there are W.

    Args:
        scores: [M, W + 1] the last h_m.
        steps: [M] how many there have been.
    """
    window = scores.shape[1] - 1
    rate = (scores[:, -1] - scores[:, 0]) / (scores[:, :-1].sum(dim=1).abs() + window * EPS)
    return torch.where(steps > window, rate, 1.0)


def phase(redundancy: Tensor, average: Tensor, s: Tensor, gamma: float) -> Tensor:
    """[M] r_m = red_m / EMA(red_m) - gamma * max(s_m, 0)."""
    ratio = redundancy / (average + EPS)
    return ratio - gamma * s.clamp(min=0.0)


def strength(h: Tensor, r: Tensor, beta: float, threshold: float) -> Tensor:
    """[M] beta_m before the gate: of the one modality that is ahead of all others, if redundant.

    exp(beta * tanh(h_m - mean of the other h)) for it, if r_m is above the threshold; else 0.

    Args:
        h: [M] h_m, or a table of them (see `mmfuse.loop.pairs`): then of the others that share
            samples with it.
        r: [M] r_m.
        beta: Strength.
        threshold: R.
    """
    count = len(h)
    others = ~torch.eye(count, dtype=torch.bool, device=h.device)
    differences = ahead(h).masked_fill(~others, 0.0)
    if h.dim() == 1:
        dominant = ((differences > 0) | ~others).all(dim=1)
        delta = differences.sum(dim=1) / (count - 1)
    else:
        compared = others & ~(h.isnan() | h.T.isnan())
        dominant = ((differences > 0) | ~compared).all(dim=1) & compared.any(dim=1)
        delta = differences.sum(dim=1) / compared.sum(dim=1)
    regulated = dominant & (r.to(h.device) > threshold)
    return torch.where(regulated, torch.exp(beta * torch.tanh(delta)), 0.0)


def share(dot: Tensor, square: Tensor) -> Tensor:
    """The displacement's share along the gradient, c = <d, g> / <g, g>; 0 where g is 0."""
    return dot / (square + EPS)


def gate_threshold(agreement: tuple[float, float], epoch: int, epochs: int) -> float:
    """The cosine above which modalities agree: from the first to the second over all epochs."""
    first, last = agreement
    return first + (last - first) * _progress(epoch, epochs - 1)


def drop_probability(schedule: tuple[float, float, float], epoch: int, epochs: int) -> float:
    """That an input is dropped: from the first to the second over the third, a share of epochs."""
    first, last, share_of_epochs = schedule
    return first + (last - first) * _progress(epoch, int(epochs * share_of_epochs))


def _progress(epoch: int, length: float) -> float:
    """How much of the first `length` epochs is over, in [0, 1]."""
    return min(1.0, max(0, epoch) / max(1.0, length))


def dropped(uniform: Tensor, probability: float, m: int, count: int) -> Tensor:
    """0-d bool, whether the m-th of `count` inputs is the one that is dropped.

    Each has its own part of [0, probability); where the number is above it, none is.
    """
    low, high = probability * m / count, probability * (m + 1) / count
    return (uniform >= low) & (uniform < high)


def check_hyperparameters(
    epochs: int,
    beta: float,
    window: int,
    momentum: float,
    projection: str,
    monitor_every: int,
) -> None:
    """Raises an error that names the first that is out of range, or no integer."""
    for name, value in (("epochs", epochs), ("window", window), ("monitor_every", monitor_every)):
        whole(name, value, least=1)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if projection not in ("tensor", "encoder"):
        raise ValueError(f"projection must be 'tensor' or 'encoder', got {projection!r}")


def check_input_dropout(input_dropout: tuple[float, float, float] | None) -> None:
    """Raises a ValueError for probabilities or a share out of range."""
    if input_dropout is not None and not all(0 <= p <= 1 for p in input_dropout):
        raise ValueError(f"input_dropout must hold numbers in [0, 1], got {input_dropout}")
