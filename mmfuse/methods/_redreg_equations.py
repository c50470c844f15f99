"""RedReg's equations beside those of a step, one function each; they change nothing.

`mmfuse.methods.redreg` has the paper, `mmfuse.reference.redundancy_pull` what a step decides.
"""

from __future__ import annotations

from torch import Tensor

from .._numbers import MOST_STEPS, finite, real, whole
from ..ops._arguments import check_sequence

#: Added to denominators.
EPS = 1e-12


def share(dot: Tensor, square: Tensor) -> Tensor:
    """The displacement's share along the gradient, c = <d, g> / <g, g>; 0 where g is 0."""
    return dot / (square + EPS)


def gate_threshold(agreement: tuple[float, float], epoch: int, epochs: int) -> float:
    """The cosine above which modalities agree: from the first to the second over all epochs."""
    first, last = agreement
    return first + (last - first) * _progress(epoch, epochs - 1)


def drop_probability(schedule: tuple[float, float, float], epoch: int, epochs: int) -> float:
    """From the first number to the second, over a share of the epochs, the third."""
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
    for name, value in (("epochs", epochs), ("monitor_every", monitor_every)):
        whole(name, value, least=1)
    whole("window", window, 1, MOST_STEPS)
    if not (finite("beta", beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    if not 0 <= real("momentum", momentum) < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if projection not in ("tensor", "encoder"):
        raise ValueError(f"projection must be 'tensor' or 'encoder', got {projection!r}")


def check_input_dropout(input_dropout: tuple[float, float, float] | None) -> None:
    """Raises a TypeError for what are no numbers, and a ValueError for some out of range."""
    if input_dropout is None:
        return
    if not isinstance(input_dropout, (list, tuple)):
        check_sequence("input_dropout", input_dropout, "numbers")
    shares = [real(f"input_dropout[{i}]", p) for i, p in enumerate(input_dropout)]
    if len(shares) != 3 or not all(0 <= p <= 1 for p in shares):
        raise ValueError(f"input_dropout must hold three numbers in [0, 1], got {input_dropout}")
