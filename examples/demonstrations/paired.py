"""Statistics of paired differences: means, bootstrap intervals, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES, SEED = 9999, 0


class Difference(NamedTuple):
    """The difference in a measure between a method and its baseline, over their common seeds."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    p: float
    count: int


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compares values that belong together by their seeds.

    The interval is the 95 % percentile bootstrap of the mean difference. The p-value is two-sided,
    from the permutation test that flips the signs of the differences; with ten seeds all 1,024
    ways are counted, and none is below 0.002. Both take the seeds as independent.

    Raises:
        ValueError: lengths differ, or there are fewer than two pairs.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"need two pairs or more, got {len(ours)} and {len(theirs)} values")
    changes = np.subtract(ours, theirs)
    mean = float(changes.mean())
    if np.ptp(changes) == 0:
        p = 1.0 if mean == 0 else 2.0 ** (1 - len(changes))
        return Difference(mean, mean, mean, p, len(changes))
    interval = stats.bootstrap(
        (changes,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    test = stats.permutation_test(
        (changes,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(SEED),
    )
    return Difference(mean, interval.low, interval.high, float(test.pvalue), len(changes))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (S. Holm, Scandinavian Journal of Statistics, 1979).

    Returns:
        The corrected p-values, in the order of those given: the k-th smallest of n is multiplied by
        n − k + 1, none is below one before it, and none is above 1.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = least
    return corrected.tolist()
