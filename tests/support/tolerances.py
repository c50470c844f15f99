"""Every tolerance of the parity tests, with its derivation. Nothing else in tests/ sets one.

u is the unit roundoff of the precision that a kernel accumulates in: 2^-24 in float32, 2^-53 in
float64; u_out is that of the stored type. All bounds are elementwise and computed in float64 from
the magnitudes of the very terms that were added.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


def shared_score(dtype: torch.dtype, per_row: Tensor, classes: int) -> Tensor:
    """Bound for rows' scores Σ a p / Σ a and Σ a log p / Σ a over C classes or labels.

    `per_row` is Σ a(1 + |log p|) / Σ a for log p, and with p in each term for p. A class's log p
    is off by (8 + √C)·u·(1 + |log p|), see softmax_score; a label's, −log1p(exp(−|z|)) and a
    product, by 8·u of that. Forming a takes four roundings, its product with p one, each of the
    two sums √C, the division one: (14 + 3√C)·u. An exponential below the smallest normal number
    may be 0.
    """
    wide = accumulation_dtype(dtype)
    return (14 + 3 * classes**0.5) * UNIT_ROUNDOFF[wide] * per_row + torch.finfo(wide).tiny


def row_weight(dtype: torch.dtype, weight: Tensor, terms: int) -> Tensor:
    """Bound for Σ w t: two roundings of a term, √L + 1 of the sum; `dtype` is the result's."""
    return (growth(terms) + 3) * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * weight


def row_entropy(dtype: torch.dtype, expected: Tensor, classes: int) -> Tensor:
    """Bound for log Σ e^(z − max) − Σ p (z − max), of which neither part exceeds the entropy.

    An exponential and its argument cost (8 + √C)·u, see softmax_score, for either part. Whenever a
    larger maximum is found, both sums are turned to it for 7 roundings; as in `log_sum_exp` that
    happens at most √C times. A number below the smallest normal number may be 0.
    """
    wide = accumulation_dtype(dtype)
    relative = 2 * (8 + classes**0.5) + 7 * classes**0.5
    return relative * UNIT_ROUNDOFF[wide] * (1 + expected) + 200 * classes * torch.finfo(wide).tiny


def abs_sum(dtype: torch.dtype, expected: Tensor, classes: int) -> Tensor:
    """√C + 1 roundings of Σ|z|."""
    return (classes**0.5 + 1) * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * expected


def weighted_mean(dtype: torch.dtype, rows: Tensor, errors: Tensor, weight: Tensor) -> Tensor:
    """Bound for Σ w s / Σ w over rows: their own errors, and √L + 4 roundings of each sum's terms.

    `rows` are the scores s, `dtype` is the accumulator's: the products, the sums' last steps, the
    division and its storage are rounded once each.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    added = (growth(rows.numel()) + 4) * u * rows.abs()
    return (weight * (errors + 2 * added)).sum() / weight.sum() + UNDERFLOW[dtype]


class Divergence(NamedTuple):
    """The parts of a divergence's bounds, [B, C] in float64, for t terms of p, q and d.

    `log_p` and `log_q` are 0 where p or q is 0, which nothing rounds. `own` is how far an error of
    p or of q moves a term, relatively; `slope` is |dt/dd|; `factors` are what p and q are
    multiplied with in the two means of the gradient, and `rates` how fast these change with d.
    """

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    terms: Tensor
    slope: Tensor
    factors: tuple[Tensor, Tensor]
    rates: tuple[Tensor, Tensor]


def _log_softmax(u: float, log_p: Tensor) -> Tensor:
    """Error of ln p, and relative error of p: see softmax_score."""
    return (8 + log_p.shape[1] ** 0.5) * u * (1 + log_p.abs())


def _definition(exact: Divergence) -> Tensor:
    """The error of the expected numbers, whose float64 terms are differences of larger ones.

    They are p and q times differences of logarithms, each with its own error.
    """
    sizes = (exact.p + exact.q) * (1 + exact.log_p.abs() + exact.log_q.abs())
    return (8 + sizes.shape[1] ** 0.5) * UNIT_ROUNDOFF[torch.float64] * sizes


def divergence(dtype: torch.dtype, exact: Divergence) -> Tensor:
    """Bound for a row's divergence, [B], from those of ln p, ln q and their difference d.

    A term t is off by 3 t times the relative error of p or q (for KL beyond |d| = 1 the parts p d,
    p and q of t come to at most 2.8 t and 1.6 |p − q|), and by its slope times the error of d. To
    first order the error that all d of a row share cancels, which this does not use. Evaluated from
    a given d: exp(−|d|) is good to 4 units, 1 − exp(−|d|) absolutely so, and its share of m is at
    most |p − q|; with log1p, the products and, beyond |d| = 1, ln 2, this comes to at most 30 u
    (t + |p − q|). Adding up positive terms costs √C, less than what their own errors have. A number
    below the smallest normal one may be 0: p, and with it p |d|.
    """
    wide = accumulation_dtype(dtype)
    u, tiny = UNIT_ROUNDOFF[wide], torch.finfo(wide).tiny
    of_p, of_q = (_log_softmax(u, x) for x in (exact.log_p, exact.log_q))
    weight = (exact.p + exact.q).clamp(min=tiny)
    own = (exact.p * of_p + exact.q * of_q) / weight
    each = 3 * exact.terms * (own + 10 * u) + 2 * exact.slope * (of_p + of_q)
    each = each + 30 * u * (exact.p - exact.q).abs()
    lost = tiny * (2 + exact.log_p.abs() + exact.log_q.abs())
    return (each + lost + _definition(exact)).sum(1)


def divergence_gradient(
    dtype: torch.dtype, exact: Divergence, side: int, expected: Tensor, weight: Tensor
) -> Tensor:
    """Bound for weight·(p (f − mean of f) + (p − q)/4), or as little as q − p, stored as `dtype`.

    f is off by its rate times the error of d and, evaluated, by 40 u (1 + |f|); the mean by that of
    its class, with that of p, and by √C; a difference of p and q by both their errors. `weight` is
    [B, 1] and carries two roundings.
    """
    wide = accumulation_dtype(dtype)
    u = UNIT_ROUNDOFF[wide]
    p, f = (exact.p, exact.q)[side], exact.factors[side]
    logs = (exact.log_p, exact.log_q)
    errors = [_log_softmax(u, x) for x in (logs[side], logs[1 - side])]
    of_f = exact.rates[side] * sum(errors) + 40 * u * (1 + f)
    mean = (p * f).sum(1, keepdim=True)
    of_mean = (p * (of_f + 2 * f * errors[0])).sum(1, keepdim=True)
    each = p * (of_f + of_mean + (f + mean) * (errors[0] + 4 * u))
    each = each + p * errors[0] + (exact.p + exact.q - p) * errors[1]
    of_definition = _definition(exact) + p * _definition(exact).sum(1, keepdim=True)
    computed = weight.abs() * (each + of_definition + torch.finfo(wide).tiny * (1 + f + mean))
    stored = UNIT_ROUNDOFF[dtype] * (expected.abs() + computed) + UNDERFLOW[dtype]
    return computed + stored


def softmax_gradient(dtype: torch.dtype, weight: Tensor, classes: int) -> Tensor:
    """Bound for w_i·(onehot − softmax)/n: as softmax_score times |w_i|, stored once as `dtype`."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    computed = (16 + 2 * classes**0.5) * u * weight.abs()
    return computed + UNIT_ROUNDOFF[dtype] * (weight.abs() + computed) + UNDERFLOW[dtype]


def ratios(dtype: torch.dtype, expected: Tensor) -> Tensor:
    """M − 1 quotients of positive numbers, their sum and a division: at most M + 2 roundings."""
    return (len(expected) + 2) * UNIT_ROUNDOFF[dtype] * expected.abs()


def coefficients(dtype: torch.dtype, count: int, alpha: float, k: Tensor) -> Tensor:
    """Bound for k of `count` modalities, worked out in float64 on both sides and stored as `dtype`.

    With x the argument of tanh, δρ ≤ (M + 2)·u·ρ moves α·tanh(x) by at most α·(M + 2)·u·ρ·sech²(x),
    where ρ·sech²(ρ − 1) < 1.2 and, with one more rounding, αρ·sech²(αρ) < 0.5. tanh itself, as
    1 − 2/(e²ˣ + 1), takes four roundings and an exponential good to 2 units; the rest takes two.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    computed = max(alpha, 1.0) * (1.2 * (count + 3) + 8) * u
    return 2 * computed + UNIT_ROUNDOFF[dtype] * k.abs()


def balancing_coefficients(
    dtype: torch.dtype, count: int, alpha: float, beta: float, k: Tensor
) -> Tensor:
    """The same for MLB's, whose argument of tanh is x = α(ρ − 1), and whose change times β − 1.

    δρ moves tanh(x) by at most (M + 2)·u·αρ·sech²(x), where αρ = x + α and x·sech²(x) < 0.45.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    computed = max(abs(beta - 1), 1.0) * ((0.45 + alpha) * (count + 3) + 8) * u
    return 2 * computed + UNIT_ROUNDOFF[dtype] * k.abs()


def modulation_noise(dtype: torch.dtype, std: Tensor) -> Tensor:
    """√(m2/(n − 1)) + ε from the same m2: three float64 roundings on each side, then `dtype`."""
    u = 6 * UNIT_ROUNDOFF[torch.float64] + UNIT_ROUNDOFF[dtype]
    return u * std.abs() + UNDERFLOW[dtype]


def information_gap(count: int, gap: Tensor) -> Tensor:
    """A mean of up to M − 1 positive differences: M + 2 float64 roundings on each side."""
    return 2 * (count + 2) * UNIT_ROUNDOFF[torch.float64] * gap.abs()


def strength(dtype: torch.dtype, count: int, beta: float, alpha: Tensor) -> Tensor:
    """Bound for exp(β tanh Δ), worked out in float64 on both sides and stored as `dtype`.

    δΔ ≤ (M + 2)·u·Δ moves tanh by at most 0.5·(M + 2)·u, as Δ·sech²Δ < 0.45; tanh itself, as
    1 − 2/(e²ˣ + 1), takes four roundings and an exponential good to 2 units. The exponential of
    β times that takes its argument's error, a product and 2 units; multiplier and gate one each.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    computed = (beta * (0.5 * (count + 2) + 8) + 6) * u
    return (2 * computed + UNIT_ROUNDOFF[dtype]) * alpha.abs()


def progress_share(
    dtype: torch.dtype, count: int, k: Tensor, whole: Tensor, magnitude: Tensor
) -> Tensor:
    """Bound for k = others/whole, both sums of differences that may cancel, stored as `dtype`.

    Part and whole have up to 2M + 2 terms of the given magnitude in all, so that each is off by
    (2M + 2)·u times that on either side; an error of the part counts once, one of the whole |k|
    times, and the quotient is rounded. A bound on k brings values no further apart, and whoever
    multiplies k rounds once more.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    computed = (2 * count + 2) * u * magnitude * (1 + k.abs()) / whole + u * k.abs()
    return 2 * computed + UNIT_ROUNDOFF[dtype] * k.abs() + UNDERFLOW[dtype]


def gain_growth(window: int, growth: Tensor) -> Tensor:
    """A difference of stored numbers by a sum of W positive ones, ε and W·ε: W + 5 roundings."""
    return 2 * (window + 5) * UNIT_ROUNDOFF[torch.float64] * growth.abs()


def redundancy_phase(window: int, gamma: float, ratio: Tensor, growth: Tensor) -> Tensor:
    """Red / EMA − γ·max(s, 0): seven roundings in average and weight, four beyond; γs and s."""
    u = UNIT_ROUNDOFF[torch.float64]
    return 2 * u * (12 * ratio.abs() + (window + 7) * gamma * growth.abs())


def orthogonal_scale(
    dtype: torch.dtype, count: int, pull: Tensor, magnitude: Tensor, scale: Tensor
) -> Tensor:
    """Bound for 1 − pull·c, c of up to T tensors' products, from the same pull; `dtype` stores it.

    `magnitude` is Σ|⟨d, g⟩| / (Σ⟨g, g⟩ + ε). T additions in either sum, four roundings in a square,
    and four beyond, on each side.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    computed = 2 * u * ((2 * count + 8) * (pull * magnitude).abs() + 1)
    return computed + UNIT_ROUNDOFF[dtype] * scale.abs()


def noisy_view(dtype: torch.dtype, result: Tensor, x: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """Bound for x + σz: the update of a gradient x whose scale is one."""
    return updated_grad(dtype, result, x, torch.zeros(()), sigma, z)


def shard_of_noisy_view(dtype: torch.dtype, x: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """A tenth of the noise's part: code for whole vectors and for their rest rounds nearly alike.

    The arithmetic is the same for both, so that the sum and its storage round once on either side.
    """
    drawn = 0.1 * sigma.abs() * noise(z)
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)] + UNIT_ROUNDOFF[dtype]
    return drawn + 2 * (u * (x.abs() + (sigma * z).abs() + drawn) + UNDERFLOW[dtype])


def growth(count: int) -> float:
    """√L for the longest run within a sum of `count` numbers."""
    return min(count, LONGEST_RUN) ** 0.5


def mean_square_difference(dtype: torch.dtype, expected: Tensor, count: int) -> Tensor:
    """|Δ mean d²| ≤ (√L + 4)·u·mean d².

    The difference is rounded once and enters twice; the square and the mean are rounded once each.
    """
    wide = accumulation_dtype(dtype)
    return (growth(count) + 4) * UNIT_ROUNDOFF[wide] * expected.abs() + 2 * UNDERFLOW[wide]


def redundancy(dtype: torch.dtype, expected: Tensor, count: int, divisor: Tensor) -> Tensor:
    """Bound as in mean_square_difference; ε, the sum with it and the division round once each.

    `divisor` is input_sq + ε, which magnifies an underflow of the mean. `expected` is the ratio.
    """
    wide = accumulation_dtype(dtype)
    relative = (growth(count) + 7) * UNIT_ROUNDOFF[wide] * expected.abs()
    return relative + 2 * UNDERFLOW[wide] / divisor + UNDERFLOW[wide]


def redundancy_gradient(dtype: torch.dtype, expected: Tensor) -> Tensor:
    """Bound for 2g(z₁ − z₂)/(n(input_sq + ε)), stored once as `dtype`.

    ε, the sum, two divisions, the difference and the product: six roundings.
    """
    computed = 6 * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * expected.abs()
    return computed + UNIT_ROUNDOFF[dtype] * (expected.abs() + computed) + UNDERFLOW[dtype]


def redundancy_input_gradient(
    dtype: torch.dtype, expected: Tensor, count: int, divisor: Tensor
) -> Tensor:
    """Bound for −g·ratio/(input_sq + ε): the ratio's, four roundings more."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    return redundancy(dtype, expected, count, divisor) + 4 * u * expected.abs()


def row_cosine(dtype: torch.dtype, cosines: Tensor, overlap: Tensor, width: int) -> Tensor:
    """Bound for the cosine of each row, of D = `width` numbers.

    ⟨a,b⟩ costs (√L + 1)·u·Σ|ab|. A norm costs half of that relatively, and two units for its root
    (or a reciprocal root, which GPUs round to two); there are two norms, their product and the
    division. `overlap` is Σ|ab|/(|a||b|), at most 1.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    run = growth(width)
    return u * ((run + 1) * overlap + (run + 7) * cosines.abs())


def cosine(
    dtype: torch.dtype, cosines: Tensor, overlap: Tensor, divisor: Tensor, width: int
) -> Tensor:
    """Bound for the mean of B rows' cosines: the rows' own, and (√L + 1)·u·mean|cos| for the mean.

    `divisor` is |a||b| of each row, which magnifies an underflow of one of the products.
    """
    wide = accumulation_dtype(dtype)
    rows = row_cosine(dtype, cosines, overlap, width) + width * UNDERFLOW[wide] / divisor
    added = (growth(len(cosines)) + 1) * UNIT_ROUNDOFF[wide] * cosines.abs()
    return (rows + added).mean() + UNDERFLOW[wide]


def cosine_gradient(
    dtype: torch.dtype,
    expected: Tensor,
    scale: Tensor,
    own: Tensor,
    other: Tensor,
    cosines: Tensor,
    overlap: Tensor,
) -> Tensor:
    """Bound for scale·(other − cos·own), stored once as `dtype`; scale = g/(B·|a|), [B, 1].

    `own` and `other` are the unit vectors [B, D], `cosines` and `overlap` [B, 1]. Each unit vector
    and the scale contain a norm of relative error (√L + 1)/2 + 2; with the divisions, products and
    the difference (eight roundings) that is √L + 13 for the terms. The cosine's error comes on top.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    width = own.shape[1]
    terms = (growth(width) + 13) * u * (other.abs() + (cosines * own).abs())
    computed = scale.abs() * (terms + row_cosine(dtype, cosines, overlap, width) * own.abs())
    stored = UNIT_ROUNDOFF[dtype] * (expected.abs() + computed) + UNDERFLOW[dtype]
    return computed + stored


def gate(dtype: torch.dtype, pairs: Tensor, cosines: Tensor, threshold: float) -> Tensor:
    """How near to the threshold the mean of the pairs' cosines may go either way.

    The pairs' own bounds, a mean over P pairs (√P + 1 roundings), and the threshold's rounding.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    added = (len(pairs) ** 0.5 + 1) * u * cosines.abs().mean()
    return pairs.mean() + added + u * abs(threshold)


def entropy(counts: Tensor) -> Tensor:
    """|Δ (ln n − Σ c ln c / n)| in float64, which equals −Σ p ln p.

    The sum's terms are at most Σ c ln c / n ≤ ln n together; (√L + 1) roundings for adding them,
    one for each logarithm's two units, the product and the quotient. The other side, −Σ p ln p,
    rounds p, its logarithm and their product, and is bounded alike.
    """
    u = UNIT_ROUNDOFF[torch.float64]
    return (growth(counts.numel()) + 8) * u * 2 * (1.0 + counts.sum().double().log())


def normalised_information(entropy_bound: Tensor, total: Tensor) -> Tensor:
    """Bound for 2·I/T, from one of all its entropies: I is made of four, each counts twice in 2·I.

    T has four as well, and the quotient is at most 1: 8·e/T + 4·e/T, and the roundings of four
    sums of entropies, each a share u of what `entropy_bound` allows for, and of the quotient.
    """
    return 13 * entropy_bound / total + 8 * UNIT_ROUNDOFF[torch.float64]


def soft_counts(dtype: torch.dtype, counts: Tensor, reached: Tensor, samples: int) -> Tensor:
    """Bound for the shared counts [P, bins, bins]; `reached` counts the samples near each cell.

    A position t ≤ bins − 1 has four roundings (two differences, quotient, product), and a share
    changes no faster than t. Either share may be off by that and its own rounding, and their
    product is rounded. Adding up costs (√L + 1) roundings; float64 has nothing wider to go on in,
    so that all its samples are one run.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    shared = 2 * (4 * (counts.shape[-1] - 1) + 1) + 1
    run = samples**0.5 if dtype == torch.float64 else growth(samples)
    return u * (shared * reached + (run + 1) * counts)


def soft_slopes(dtype: torch.dtype, corners: Tensor, bins: int) -> Tensor:
    """Bound for a sample's slope, (1 − g)(c₁₀ − c₀₀) + g(c₁₁ − c₀₁).

    g is off by at most the 4(bins − 1) + 1 roundings of `soft_counts`; it meets two differences,
    which are rounded, as are their products and the sum. `corners` is Σ|c| over the four.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    return (4 * (bins - 1) + 5) * u * corners


def soft_gradient(dtype: torch.dtype, expected: Tensor, slopes: Tensor, per_unit: Tensor) -> Tensor:
    """slope·per_unit, stored once: the slope's bound and three roundings (two in per_unit)."""
    computed = per_unit * slopes + 3 * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * expected.abs()
    return computed + UNIT_ROUNDOFF[dtype] * (expected.abs() + computed) + UNDERFLOW[dtype]


def soft_range_gradient(
    dtype: torch.dtype, magnitude: Tensor, slopes: Tensor, samples: int, bins: int
) -> Tensor:
    """Bound for Σ slope·t / width, times the width; `magnitude` is Σ|slope|·(bins − 1).

    Every |t| ≤ bins − 1 is off by four roundings of that; its difference, its product and the
    division are rounded, and the width; adding up costs √L + 1. `slopes` are their own bounds.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    return (growth(samples) + 9) * u * magnitude + (bins - 1) * slopes


def similarity(dtype: torch.dtype, magnitude: Tensor, width: int) -> Tensor:
    """|Δ S| ≤ (√L + 3)·u·Σ|a||b|/τ: the inner product, and a division or two."""
    return (growth(width) + 3) * UNIT_ROUNDOFF[accumulation_dtype(dtype)] * magnitude


def log_sum_exp(dtype: torch.dtype, s: Tensor, error: Tensor) -> Tensor:
    """Bound for log Σ_j exp s_ij, from those of s.

    Each exponential has the weight p_ij. Its argument s − max and the factors that later, larger
    maxima bring along are rounded to two units of their sizes, which are at most lse − s in all,
    an exponential costs four; at most √L of the factors are not 1, up to the bounds of `growth`.
    Adding up costs √L + 1, the logarithm two and the sum with the maximum one.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    lse = s.logsumexp(1, keepdim=True)
    p = (s - lse).exp()
    away = torch.where(p > 0, lse - s, 0.0)
    own = u * (4 * away + 5 * growth(s.shape[1]) + 9)
    weighted = torch.where(p > 0, p * (torch.where(p > 0, error, 0.0) + own), 0.0).sum(1)
    largest = s.abs().where(p > 0, torch.zeros_like(s)).amax(1)
    return weighted + 2 * u * (lse.squeeze(1).abs() + largest)


def soft_entropy(dtype: torch.dtype, p: Tensor, samples: int) -> Tensor:
    """Bound for −Σ p ln p over the last dimension, from the counts [..., n] themselves.

    A count of a margin is a sum that is rounded once, p once more; by both a term moves by at most
    2u·p(1 + |ln p|). The logarithm takes two units of 1 + |ln p|, the product one; adding up √L + 1
    of all terms' magnitudes, and the result is stored.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    size = p * (1 + torch.where(p > 0, p.log().abs(), 0.0))
    return (5 + growth(p.shape[-1]) + 2) * u * size.sum(-1)


def soft_entropy_slope(dtype: torch.dtype, p: Tensor, weight: Tensor) -> Tensor:
    """Bound for −g(ln p + 1): p's two roundings, two units of 1 + |ln p|, three for the rest."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    least = torch.finfo(accumulation_dtype(dtype)).tiny
    return 7 * u * weight.abs() * (1 + p.clamp(min=least).log().abs())


def info_nce(
    dtype: torch.dtype, diagonal: Tensor, diagonal_error: Tensor, sums: Tensor, sums_error: Tensor
) -> Tensor:
    """Bound for log B + mean(S_ii − sums_i), where sums is the mean of both log-sum-exps.

    Three roundings form a term, √L + 1 the mean, two the logarithm of B and the sum.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    count = len(diagonal)
    rounded = (growth(count) + 4) * u * (diagonal.abs() + 2 * sums.abs())
    own = 3 * u * torch.tensor(float(count)).log()
    return (diagonal_error + sums_error + rounded).mean() + own


def info_nce_slope(
    dtype: torch.dtype, s: Tensor, error: Tensor, sums: Tensor, sums_error: Tensor
) -> Tensor:
    """Bound for exp(S − sums), with sums as [B, 1] or [1, B]; the exponential's bound is its own.

    The difference is rounded to its size (twice, where the exponential is one of two), exp to four.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    p = (s - sums).exp()
    argument = error + sums_error + 2 * u * (s - sums).abs()
    relative = torch.expm1(argument) + 4 * u
    return torch.where(p > 0, p * relative, 0.0) + UNDERFLOW[accumulation_dtype(dtype)]


def info_nce_gradient(
    dtype: torch.dtype,
    expected: Tensor,
    slope: Tensor,
    slope_error: Tensor,
    other: Tensor,
    temperature: Tensor,
    *,
    halves: bool = False,
) -> Tensor:
    """Bound for G·other/τ, stored once: G's bound, √L + 1 for each sum, six roundings on the way.

    Forming G from its two exponentials takes three roundings of at most its largest part, the
    weight grad/B two, the temperature one. With `halves`, G is handed to the product as two numbers
    in half precision: the first is off by u_out·|G|, the second, which stands for that, by u_out of
    it, or by half a unit of its smallest numbers, at 2^15 times the size in float16. Their products
    with `other` are exact; adding up two sums in place of one takes √L + 1 and two roundings more.
    """
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    terms = slope_error + (growth(len(other)) + 7) * u * slope
    if halves and dtype in (torch.float16, torch.bfloat16):
        smallest = UNDERFLOW[dtype] * (2.0**-15 if dtype == torch.float16 else 1.0)
        terms = terms + UNIT_ROUNDOFF[dtype] ** 2 * slope + smallest
        terms = terms + (growth(len(other)) + 3) * u * slope
    computed = terms @ other.abs() / temperature
    return computed + UNIT_ROUNDOFF[dtype] * (expected.abs() + computed) + UNDERFLOW[dtype]


def info_nce_temperature_gradient(
    dtype: torch.dtype, s: Tensor, error: Tensor, slope: Tensor, slope_error: Tensor, tau: Tensor
) -> Tensor:
    """Bound for −Σ G∘S/τ: the parts' own, √L + 1 for the sum and six roundings on the way."""
    u = UNIT_ROUNDOFF[accumulation_dtype(dtype)]
    parts = slope_error * (s.abs() + error) + slope * error
    return (parts + (growth(s.numel()) + 7) * u * slope * s.abs()).sum() / tau


def binned_gaussian(rho: float, samples: int, width: float, variance: float) -> tuple[float, float]:
    """Between what an estimate of I = −½ln(1 − ρ²) from a histogram of N samples lies.

    Upwards the plug-in bias, (bins − 1)²/(2N), is the caller's to add. Downwards, a bin of `width`
    standard deviations adds `variance`·width² to each variance (1/12 in a bin, Sheppard; 1/6 on
    average where linear interpolation shares a sample out, f(1 − f)) without changing the
    covariance: ρ′ = ρ/(1 + variance·width²). That is the leading order, of which twice is allowed.
    The information density of a pair has the variance ρ²; five deviations of its mean are allowed.
    """
    exact = -0.5 * math.log(1 - rho**2)
    blurred = -0.5 * math.log(1 - (rho / (1 + variance * width**2)) ** 2)
    sampled = 5 * rho / samples**0.5
    return exact - 2 * (exact - blurred) - sampled, exact + sampled


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


def whole_case(expected: Tensor) -> Tensor:
    """A bound for all that every_kernel.py's cases write, whichever op it is from.

    Their inputs are some 10^4 standard normal deviates at most, and their longest sums cancel: the
    error (√L + 4)·u·Σ|ab| of `sum_of_products` is up to √N times as large beside the result, √N <
    200: 200 · 68 · 2^-24 = 8e-4. Half precision is rounded once in each of up to eight updates in
    place: 8·u. An element counts together with its tensor's mean square, since others' errors meet
    in it; where all of a tensor cancels, as the gradient of a cosine of numbers does, terms of
    about 1 leave (√L + 4)·u. This finds a wrong element, a wrong index, a missing term; the tests
    of each op bound the rounding itself.
    """
    wide = expected.double()
    size = wide.abs() + wide.square().mean().sqrt()
    cancelled = (GROWTH + 4) * UNIT_ROUNDOFF[torch.float32]
    return max(1e-3, 8 * UNIT_ROUNDOFF[expected.dtype]) * size + cancelled
