"""Paired differences: intervals and p-values against numbers that are known."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from demonstrations.paired import difference, holm, least


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


def test_the_interval_is_that_of_student() -> None:
    """Mean 3 and standard error sqrt(2.5 / 5); the quantile of 4 degrees of freedom is 2.776."""
    found = difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    half = 2.7764 * math.sqrt(0.5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-4)


def test_many_pairs_are_tested_by_drawn_signs() -> None:
    """Twenty equal signs are as rare as can be; alternating ones are not rare at all."""
    assert difference([1.0] * 20, [0.0] * 20).p == least(20) == 2.0**-15
    assert difference([1.0, -1.0] * 10, [0.0] * 20).p == 1.0
    steps = [float(i) for i in range(-3, 17)]
    # The sign-flip test's normal approximation, from the sum and the sum of squares.
    z = sum(steps) / math.sqrt(sum(x * x for x in steps))
    assert difference(steps, [0.0] * 20).p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.003)


def test_equal_differences_have_no_width() -> None:
    assert difference([0.5, 0.75], [0.25, 0.5])[:4] == (0.25, 0.25, 0.25, 0.5)
    assert difference([0.5, 0.5], [0.5, 0.5])[:4] == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_pairs_are_needed(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="two pairs or more"):
        difference(ours, theirs)
