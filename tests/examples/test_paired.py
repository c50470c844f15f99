"""Paired differences: intervals and p-values against numbers that are known."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from demonstrations.paired import difference, holm


def test_holm_corrects_as_in_the_textbook() -> None:
    """The factors of 0.01, 0.02, 0.03, 0.04 are 4, 3, 2 and 1, and no result is below the last."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_p_value_counts_all_signs() -> None:
    """Two of 32 sign patterns of five positive differences have a mean as far from 0."""
    found = difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    assert found.p == pytest.approx(2 / 32)
    assert (found.mean, found.count) == (3.0, 5)
    assert difference([1.0, -1.0, 2.0, -2.0], [0.0] * 4).p == 1.0


def test_the_interval_is_that_of_the_bootstrap() -> None:
    """The resampled means of a and b are a, (a + b)/2 and b with 1/4, 1/2 and 1/4."""
    found = difference([0.2, 0.4], [0.0, 0.0])
    assert (found.low, found.high) == pytest.approx((0.2, 0.4))
    # With many values it comes near the normal interval: mean ± 1.96 sd / sqrt(n).
    values = [math.sin(17.0 * i) for i in range(400)]
    found = difference(values, [0.0] * 400)
    sd = math.sqrt(sum((v - found.mean) ** 2 for v in values) / 400)
    half = 1.96 * sd / 20
    # The percentiles of 9,999 resamples have a standard error of 2.7 % of the half-width's sigma.
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_equal_differences_need_no_resampling() -> None:
    assert difference([0.5, 0.75], [0.25, 0.5])[:4] == (0.25, 0.25, 0.25, 0.5)
    assert difference([0.5, 0.5], [0.5, 0.5])[:4] == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_pairs_are_needed(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="two pairs or more"):
        difference(ours, theirs)
