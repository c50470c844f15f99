"""Statistics of paired differences: means, t intervals, sign-flip tests, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats

EXACT, DRAWN, SEED = 16, 2**15, 0
LEVEL = 0.05


class Difference(NamedTuple):
    """The difference in a measure between a method and its baseline, over their common seeds."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    p: float
    count: int


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compares values that belong together by their seeds.

    The interval is the 95 % t interval of the mean difference. The p-value is two-sided, from the
    permutation test that flips the signs of the differences; up to 16 seeds all ways are counted,
    and none is below 2^(1 − seeds). Both take the seeds as independent.

    Raises:
        ValueError: lengths differ, or there are fewer than two pairs.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"need two pairs or more, got {len(ours)} and {len(theirs)} values")
    changes = np.subtract(ours, theirs)
    count, mean = len(changes), float(changes.mean())
    half = float(stats.t.ppf(1 - LEVEL / 2, count - 1) * changes.std(ddof=1) / count**0.5)
    sums = np.abs(_signs(count) @ changes)
    # Sums of the same numbers in another order differ by rounding.
    p = float((sums >= abs(changes.sum()) - 1e-9 * np.abs(changes).sum()).mean())
    return Difference(mean, mean - half, mean + half, p, count)


@cache
def _signs(count: int) -> np.ndarray:
    """Patterns of signs; one sign is always +, as the test is two-sided, and one pattern all +."""
    if count > EXACT:
        signs = np.random.default_rng(SEED).choice((-1.0, 1.0), (DRAWN, count))
        signs[0] = 1.0
        return signs
    bits = np.arange(2 ** (count - 1))[:, None] >> np.arange(count)
    return 1.0 - 2.0 * (bits & 1)


def least(count: int) -> float:
    """The smallest p-value that as many pairs can have."""
    return max(2.0 ** (1 - count), 1 / DRAWN)


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
