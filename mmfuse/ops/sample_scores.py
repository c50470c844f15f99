"""sample_scores: how sure each modality is of each sample's target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._devices import WIDE
from .._numbers import flag
from ._arguments import check_sequence
from ._criterion import ARGUMENTS, PLAIN, Criterion, check_range, checked
from ._eager import Eager
from ._registry import Op


class SampleScores(NamedTuple):
    """Scores of M modalities, row by row.

    Attributes:
        prob: [M, N, d1, …]; the target's probability, 0 where a row does not count.
        log_prob: [M, N, d1, …]; its logarithm, in nats, and 0 there.
        weight: [N, d1, …] float64; how much each row counts, 0 for one that does not.
        correct: [M, N, d1, …] bool; whether the label is the argmax, the first one if several are.
            This and what follows are None without `statistics`, and False or 0 where a row does
            not count.
        entropy: [M, N, d1, …]; −Σ p log p of the softmax, in nats.
        log_sum_exp: [M, N, d1, …]; log Σ exp z of the logits.
        abs_sum: [M, N, d1, …]; Σ |z|.
    """

    prob: Tensor
    log_prob: Tensor
    weight: Tensor
    correct: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None
    abs_sum: Tensor | None = None


def _fake(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = any(z.dtype == torch.float64 for z in logits)
    dtype = torch.float64 if wide else torch.float32
    rows = list(labels.shape)
    if labels.is_floating_point():
        del rows[1]
    prob = torch.empty([len(logits), *rows], dtype=dtype, device=labels.device)
    weights = torch.empty(rows, dtype=WIDE[labels.device.type], device=labels.device)
    return prob, torch.empty_like(prob), weights


def _fake_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    prob, log_prob, weights = _fake(*arguments)
    correct = torch.empty_like(prob, dtype=torch.bool)
    return prob, log_prob, weights, correct, *(torch.empty_like(prob) for _ in range(3))


_op = Op(
    "sample_scores",
    f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake,
    module="modality_scores",
)
_statistics_op = Op(
    "sample_statistics",
    f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_statistics,
    module="modality_scores",
    public="sample_scores",
)


def sample_scores(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    multilabel: bool = False,
    pos_weight: Tensor | None = None,
    statistics: bool = False,
    backend: str | None = None,
) -> SampleScores:
    """The target's probability, its logarithm and the row's weight, per modality and sample.

    These are the rows that `modality_scores` averages: its prob is the weighted mean
    (weight * prob).sum() / weight.sum() over all rows, and its count is weight.sum(). The results
    are constants, as after `detach`.

    Equivalent to, for each modality's logits z and class indices labels::

        log_p = z.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        log_p.exp(), log_p, torch.ones_like(labels) if weight is None else weight[labels]

    With probabilities t as targets, and w = 1 for `weight=None`, to::

        a = t * w.view(-1, *[1] * (t.dim() - 2))
        (a * z.softmax(1)).sum(1) / a.sum(1), (a * z.log_softmax(1)).sum(1) / a.sum(1), a.sum(1)

    With `multilabel`, prob and log_prob are the means over the labels that `modality_scores` takes,
    and every row's weight is 1.

    With `statistics`, the same read of the logits also gives, of each row, for class indices::

        correct, entropy = z.argmax(1) == labels, -(z.softmax(1) * z.log_softmax(1)).sum(1)
        correct, entropy, z.logsumexp(1), z.abs().sum(1)

    where p log p is 0 for p = 0. All are 0 where a row does not count; where the softmax is NaN,
    entropy and log_sum_exp are too, and no label is the argmax. Their means are what CGGM (top-1
    rate) and ARL (entropy and Σ|z|) compare; the fusions of MLA and QMF weigh each sample by its
    entropy or its log-sum-exp.

    Args:
        logits: As in `modality_scores`.
        labels: As there.
        weight: As there.
        ignore_index: As there.
        multilabel: As there.
        pos_weight: As there.
        statistics: Also correct, entropy, log_sum_exp and abs_sum; labels are class indices then.
        backend: Name of a backend; None for the best one.

    Returns:
        `SampleScores`; all but weight and correct are float64 if some logits are, else float32.

    Raises:
        TypeError: logits, labels or weights have an unsupported dtype or layout.
        ValueError: shapes do not match, statistics are asked for with other labels than class
            indices, or, on the CPU, a target is out of range; on other devices
            the scores of that row are NaN.
    """
    if not isinstance(logits, (list, tuple)):
        check_sequence("logits", logits)
    names = [f"logits[{m}]" for m in range(len(logits))]
    criterion = Criterion(weight, ignore_index, multilabel, pos_weight)
    return named_sample_scores(names, logits, labels, backend, criterion, statistics)


def named_sample_scores(
    names: Sequence[str],
    logits: Sequence[Tensor],
    labels: Tensor,
    backend: str | None,
    criterion: Criterion = PLAIN,
    statistics: bool = False,
) -> SampleScores:
    """`sample_scores`, with errors that call the logits by these names."""
    statistics = flag("statistics", statistics)
    arguments = checked(names, logits, labels, criterion)
    if statistics and arguments[1].is_floating_point():
        what = "multilabel=True" if criterion.multilabel else "probabilities"
        raise ValueError(f"statistics=True is for labels that are class indices, not {what}")
    op = _statistics_op if statistics else _op
    prob, log_prob, rows, *more = op(backend, labels.device, *arguments)
    on_cpu = labels.device.type == "cpu"
    compiled = type(backend) is not Eager and torch.compiler.is_compiling()
    if on_cpu and not compiled and math.isnan(prob.sum().tolist()):
        check_range(names, logits, labels, criterion)
    first = logits[0]
    shape = [*first.shape[:1], *first.shape[2:]]
    if len(shape) < 3:
        return SampleScores(prob, log_prob, rows, *more)
    each = [len(logits), *shape]
    more = [x.view(each) for x in more]
    return SampleScores(prob.view(each), log_prob.view(each), rows.view(shape), *more)
