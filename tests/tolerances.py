"""Every tolerance of the parity tests, with its derivation. Nothing else in tests/ sets one.

u is the unit roundoff of the precision that a kernel accumulates in: 2^-24 in float32, 2^-53 in
float64; u_out is that of the stored type. All bounds are elementwise and computed in float64 from
the magnitudes of the very terms that were added.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Half a unit in the last place of the smallest numbers: what rounding to zero can cost.
UNDERFLOW = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}

# The noise contract of design.md section 5.
NOISE = 1e-5


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise(z: Tensor) -> Tensor:
    """|Δz| ≤ 1e-5 (1 + |z|), fixed by the contract."""
    return NOISE * (1.0 + z.abs())


def updated_grad(
    dtype: torch.dtype, result: Tensor, scaled: Tensor, pulled: Tensor, noise_std: Tensor, z: Tensor
) -> Tensor:
    """Bound for scale·g + pull·(w − w₀) + noise_std·z, stored as `dtype`.

    At most six roundings in the accumulator's precision touch any term (difference, product, two
    sums, and the coefficients' own conversion), each worth u times the terms' magnitudes; `pulled`
    is |pull|·(|w| + |w₀|), because the difference may cancel. The noise adds its own tolerance and
    the result is rounded once to `dtype`.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    arithmetic = 6 * u * (scaled.abs() + pulled.abs() + (noise_std * z).abs())
    drawn = noise_std.abs() * noise(z)
    stored = UNIT_ROUNDOFF[dtype] * (result.abs() + arithmetic + drawn) + UNDERFLOW[dtype]
    return arithmetic + drawn + stored


# The longest run of numbers that a backend adds one after the other in its accumulator's precision,
# before it goes on pairwise or in float64. Rounding errors of a run of L are independent to first
# order, so that they grow like sqrt(L).
LONGEST_RUN = 4096
GROWTH = LONGEST_RUN**0.5


def mean(dtype: torch.dtype, mean_magnitude: Tensor) -> Tensor:
    """|Δ mean| ≤ √L·u·mean|g|, and one rounding of the result."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    return (GROWTH + 1) * u * mean_magnitude + UNDERFLOW[accumulation_dtype(dtype)]


def sum_of_products(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """|Δ Σab| ≤ (√L + 4)·u·Σ|a||b|: forming a and b costs up to four roundings more.

    For m2 the magnitudes are Σ(g − mean)² themselves, because a stable algorithm centres first.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    return (GROWTH + 4) * u * magnitude + UNDERFLOW[accumulation_dtype(dtype)]


def softmax_score(dtype: torch.dtype, per_row: Tensor, classes: int) -> Tensor:
    """Bound for a batch mean of p or of log p, from its rows' sensitivities.

    log p = (z_y − max) − log Σ exp(z − max): the subtractions cost u·|log p| each, exp and log 2 u,
    the sum of C positive terms √C·u. `per_row` is 1 + |log p| for log p, and p·(1 + |log p|) for p.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    factor = 8 + classes**0.5
    return factor * u * per_row.mean() + UNDERFLOW[accumulation_dtype(dtype)] * 4


def softmax_gradient(dtype: torch.dtype, weight: Tensor, classes: int) -> Tensor:
    """Bound for w_i·(onehot − softmax)/n: as softmax_score times |w_i|, stored once as `dtype`."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    computed = (16 + 2 * classes**0.5) * u * weight.abs()
    return computed + UNIT_ROUNDOFF[dtype] * (weight.abs() + computed) + UNDERFLOW[dtype]


def ratios(dtype: torch.dtype, expected: Tensor) -> Tensor:
    """M − 1 quotients of positive numbers, their sum and a division: at most M + 2 roundings."""
    return (len(expected) + 2) * UNIT_ROUNDOFF[dtype] * expected.abs()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "result") -> None:
    """Asserts |actual − expected| ≤ bound elementwise; NaN matches NaN, and Inf the same Inf."""
    actual = actual.detach().cpu().double()
    expected, bound = expected.detach().cpu().double(), bound.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    close = (actual - expected).abs() <= bound
    wrong = ~(same | close)
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        a, e, b = (t.expand_as(actual).flatten()[i].item() for t in (actual, expected, bound))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {i}: "
            f"{a} instead of {e}, off by {abs(a - e):.3g}, allowed {b:.3g}"
        )
