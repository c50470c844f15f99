"""AGM's rule: the coefficients of responses. `mmfuse.methods.agm` has the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._numbers import finite, real
from ..loop.given import (
    Loss,
    More,
    check_present,
    criterion_of,
    own_numbers,
    own_pair_scores,
    pair_scores,
)
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops.modality_scores import named_scores
from ..ops.sample_scores import named_sample_scores


@dataclass(frozen=True)
class AGMResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        logits: Name → the response, with its values as they were; the joint logits are their sum.
        coefficients: [M] k_m that the backward pass uses, in the order of `logits`.
        scores: [M] s_m, the loss of each response alone; NaN for a modality that no sample has.
            None in `eval()`, as what follows.
        ratios: [M] rho_m; NaN for a modality that shares samples with no other.
        usual_ratios: [M] tau_m; NaN likewise.
    """

    logits: dict[str, Tensor]
    coefficients: Tensor
    scores: Tensor | None = None
    ratios: Tensor | None = None
    usual_ratios: Tensor | None = None


@dataclass(frozen=True)
class AGMRule:
    """The equations above, of paper and released code alike.

    Attributes:
        alpha: α.
        cap: The most that tau_m − rho_m counts; None for no limit.
        floor: Probabilities below it count as it.
        stays: True if the last coefficients stay in force after the last epoch.
    """

    alpha: float = 1.0
    cap: float | None = 10.0
    floor: float = 0.0
    stays: bool = False

    def __post_init__(self) -> None:
        if not (finite("alpha", self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a finite number of at least 0, got {self.alpha}")
        if self.cap is not None and not (finite("cap", self.cap) and self.cap >= 0):
            raise ValueError(f"cap must be a finite number of at least 0 or None, got {self.cap}")
        if not 0 <= real("floor", self.floor) < 1:
            raise ValueError(f"floor must be a probability below 1, got {self.floor}")

    def ratios(self, scores: Tensor, shared: Tensor | None) -> Tensor:
        """rho_m of s_m, or tau_m of S_m.

        Args:
            scores: [M, M] of modality m, over the samples that have m and j.
            shared: [M, M] bool, whether there are such; None if all modalities are everywhere.

        Returns:
            [M] exp of the mean over j ≠ m of s_j − s_m; NaN where m shares samples with none.
        """
        lead = scores.T - scores
        if shared is None:
            return torch.exp(lead.sum(1) / (len(scores) - 1))
        others = shared & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return torch.exp(torch.where(others, lead, 0.0).sum(1) / others.sum(1))

    def coefficients(self, ratios: Tensor, usual: Tensor) -> Tensor:
        """k_m."""
        ahead = usual - ratios
        if self.cap is not None:
            ahead = ahead.clamp(max=self.cap)
        return torch.exp(self.alpha * ahead)


def look_at(
    rule: AGMRule,
    logits: Mapping[str, Tensor],
    labels: Tensor | None,
    more: More,
    criterion: Loss,
    device: torch.device,
    backend: str | None,
) -> Observed:
    """−s_m of this rank, or a table of them (see `mmfuse.loop.pairs`); with all checks.

    Args:
        rule: Whose floor the probabilities have.
        logits: Name → response of each modality.
        labels: Their targets; None where the scores are the user's.
        more: Masks, or those scores.
        criterion: The loss that logits and labels are for.
        device: The device that the user's scores go to.
        backend: Name of a backend; None for the best one.
    """
    kind, numbers, weight = own_numbers(list(logits), device, more, None)
    if kind is not None:
        own = own_pair_scores(numbers, weight)
        return Observed(own.log_prob, own.count, paired=True)
    assert labels is not None
    names, how = [f"logits[{name!r}]" for name in logits], criterion_of(criterion)
    values, present = list(logits.values()), more.get("present")
    if not rule.floor and present is None:
        found = named_scores(names, values, labels, backend, how)
        return Observed(found.log_prob, found.count)
    each = named_sample_scores(names, values, labels, backend, how)
    counts = each.weight.to(each.log_prob)
    floored = each.log_prob
    if rule.floor:
        floored = floored.clamp(min=math.log(rule.floor))
    if present is not None:
        mask = check_present(list(logits), present, len(labels), labels.device)
        found = pair_scores(each._replace(log_prob=floored), mask)
        return Observed(found.log_prob, found.count, paired=True)
    # Selected, not multiplied with 0: what does not count may be NaN.
    total = torch.where(counts > 0, counts * floored, 0.0).flatten(1).sum(1)
    return Observed(total / counts.sum(), each.weight.sum())
