"""Hypothesis: the settings and the values that the property tests of the ops share."""

from __future__ import annotations

from hypothesis import HealthCheck
from hypothesis import strategies as st
from inputs import DTYPES

COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**64 - 1)
