"""Bootstrap intervals of many numbers at once, from the same resamples of samples."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._packages import package

Key = TypeVar("Key")

# Indices of resamples that are held at a time.
_HELD = 4_000_000


class Estimate(NamedTuple):
    """A number, and the interval of its resampled values.

    Attributes:
        value: Of all samples; NaN where it is not defined.
        low: Lower end; None without resamples, or where the value is not defined in all of them.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def estimates(
    count: int,
    numbers: Callable[[Tensor | None], dict[Key, float]],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[Key, Estimate]:
    """Every number with its percentile interval.

    All numbers see the same resamples, so that a difference or a ratio among them is one of pairs.

    Args:
        count: Samples.
        numbers: Indices of samples [count], or None for all → the numbers, by keys that are
            always the same.
        resamples: How many; 0 for none.
        confidence: Share of the resampled values within the interval.
        seed: Of the resamples.
    """
    values = numbers(None)
    if resamples == 0 or count < 2:
        return {key: Estimate(value) for key, value in values.items()}
    numpy, stats = package("numpy"), package("scipy.stats")

    def statistic(rows: Any, axis: int = -1) -> Any:
        drawn = rows.reshape(-1, count)
        columns = [list(numbers(torch.from_numpy(row.copy())).values()) for row in drawn]
        return numpy.array(columns, dtype=float).T.reshape(-1, *rows.shape[:-1])

    # SciPy has renamed it.
    known = inspect.signature(stats.bootstrap).parameters
    drawing = "rng" if "rng" in known else "random_state"
    with numpy.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are not defined, which become None
        found = stats.bootstrap(
            (numpy.arange(count),),
            statistic,
            n_resamples=resamples,
            batch=max(1, _HELD // count),
            vectorized=True,
            axis=-1,
            confidence_level=confidence,
            method="percentile",
            **{drawing: numpy.random.default_rng(seed)},
        )
    interval = found.confidence_interval
    ends = zip(values.items(), interval.low.tolist(), interval.high.tolist(), strict=True)
    return {key: Estimate(value, _known(low), _known(high)) for (key, value), low, high in ends}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
