"""How far two batches of logits are apart, as distributions, row by row.

With d = ln p - ln q, x = |d| / 2 and m = (p + q) / 2, the terms of the sums over the classes are

    kl       p (d - 1 + exp(-d)), which adds up to the sum of p d: both p and q sum to 1
    mixture  m ln cosh(x)
    js       m (x tanh(x) - ln cosh(x))

None of them is negative or, near d = 0, the difference of larger ones, as p d is; and none of the
sums changes, to first order, with an error that all d of a row share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtype import accumulator
from ._example import Normal

#: The kinds; the operators take the place of one.
KINDS = ("kl", "mixture", "js")
KL, MIXTURE, JS = range(3)

#: Of each row and pair: both maxima, both logarithms of the sums of exp(z - maximum), and the means
#: under p and under q that the gradients take: of d with "kl" (under p), of `_log_cosh` with
#: "mixture", of `_halves` with "js".
ROW_NUMBERS = 6

# Below it, ln cosh as a sum would be the difference of larger numbers.
SMALL = 1.0


class _Row(NamedTuple):
    """Softmax of both and their log ratio, [B, C], and their maxima and log-sums, [B, 1]."""

    p: Tensor
    q: Tensor
    d: Tensor
    numbers: tuple[Tensor, ...]


def _shared(a: Tensor, x: Tensor) -> Tensor:
    """A share of x; of nothing 0, whatever x is."""
    return torch.where(a == 0, 0.0, a * x)


def _rows(first: Tensor, second: Tensor, dtype: torch.dtype) -> _Row:
    below, tops, log_sums = [], [], []
    for z in (first.to(dtype), second.to(dtype)):
        tops.append(z.amax(1, keepdim=True))
        below.append(z - tops[-1])
        log_sums.append(below[-1].exp().sum(1, keepdim=True).log())
    p, q = ((z - s).exp() for z, s in zip(below, log_sums, strict=True))
    d = (below[0] - below[1]) - (log_sums[0] - log_sums[1])
    return _Row(p, q, d, (*tops, *log_sums))


def _log_cosh(d: Tensor) -> Tensor:
    """Ln cosh(d / 2)."""
    x = d.abs() / 2
    far = x + ((-2 * x).exp().log1p() - math.log(2))
    return torch.where(2 * x < SMALL, x.sinh().square().log1p() / 2, far)


def _halves(d: Tensor) -> tuple[Tensor, Tensor]:
    """Half of ln(p / m), and of ln(q / m)."""
    nearer = math.log(2) - (-d.abs()).exp().log1p()
    farther = nearer - d.abs()
    above = d >= 0
    return torch.where(above, nearer, farther) / 2, torch.where(above, farther, nearer) / 2


def _kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    near = p * (d + torch.expm1(-d))
    return torch.where(d.abs() < SMALL, near, _shared(p, d) - p + q)


def _js_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    x, e = d.abs() / 2, (-d.abs()).exp()
    far = math.log(2) - e.log1p() - _shared(e, 2 * x) / (1 + e)
    return _shared((p + q) / 2, torch.where(2 * x < SMALL, x * x.tanh() - _log_cosh(d), far))


def _values(row: _Row, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's divergence, and the two means that its gradients take."""
    p, q, d, _ = row
    if kind == KL:
        value = _kl_terms(p, q, d).sum(1)
        return value, value, torch.zeros_like(value)
    if kind == MIXTURE:
        h = _log_cosh(d)
        under_p, under_q = _shared(p, h).sum(1), _shared(q, h).sum(1)
        return (under_p + under_q) / 2, under_p, under_q
    u, v = _halves(d)
    return _js_terms(p, q, d).sum(1), _shared(p, u).sum(1), _shared(q, v).sum(1)


def logit_divergence(
    first: Sequence[Tensor], second: Sequence[Tensor], kind: int, per_row: bool
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.logit_divergence`; and `ROW_NUMBERS` of each row, [K, 6, B]."""
    wide = accumulator(*first, *second)
    values, numbers = [], []
    for a, b in zip(first, second, strict=True):
        row = _rows(a, b, accumulator(a))
        value, *means = _values(row, kind)
        values.append((value if per_row else value.mean()).to(wide))
        numbers.append(torch.stack([*(n.squeeze(1) for n in row.numbers), *means]).to(wide))
    return torch.stack(values), torch.stack(numbers)


def _slopes(row: _Row, kind: int, means: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Derivatives of the divergence by both logits."""
    p, q, d, _ = row
    under_p, under_q = means
    if kind == KL:
        return _shared(p, d - under_p), q - p
    if kind == MIXTURE:
        h, quarter = _log_cosh(d), (p - q) / 4
        return _shared(p, h - under_p) / 2 + quarter, _shared(q, h - under_q) / 2 - quarter
    u, v = _halves(d)
    return _shared(p, u - under_p), _shared(q, v - under_q)


def logit_divergence_backward(
    grad: Tensor,
    rows: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    kind: int,
    to_first: bool,
    to_second: bool,
) -> list[Tensor]:
    """Gradients of the first logits, then of the second, as far as they are wanted."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for k, pair in enumerate(zip(first, second, strict=True)):
        row = _rows(*pair, accumulator(*pair))
        weight = grad[k].to(row.d).reshape(-1, 1)
        if grad.dim() == 1:
            weight = weight / pair[0].shape[0]
        means = [n.to(row.d).unsqueeze(1) for n in rows[k, 4:]]
        for each, slope, z in zip(found, _slopes(row, kind, means), pair, strict=True):
            each.append((weight * slope).to(z.dtype))
    return [*(found[0] if to_first else ()), *(found[1] if to_second else ())]


def examples(normal: Normal) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, from standard normal numbers of a shape."""
    first, second = ([normal(5, classes) for classes in (3, 7)] for _ in range(2))
    rows = logit_divergence(first, second, JS, False)[1]
    return {
        "logit_divergence": (first, second, JS, False),
        "logit_divergence_backward": (normal(2), rows, first, second, JS, True, True),
    }
