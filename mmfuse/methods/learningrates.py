"""A learning rate for each encoder: the control that a balanced method has to beat.

Yao & Mihalcea, "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion",
Findings of ACL 2022, train every modality at a rate of its own. With SGD a rate is a factor on the
encoder's gradient, which stays the same for the whole training:

    update  g <- c_m g
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..loop._parameters import Encoder
from ..loop.contract import (
    Act,
    Batch,
    Card,
    Clock,
    Common,
    Decision,
    Need,
    Sensed,
    State,
    Stateless,
    Tensors,
)
from ..loop.given import Kind
from ..loop.gradients import GradientMethod
from ..loop.pairs import own
from ..loop.ranks import Observed
from ..ops._arguments import check_sequence
from ..ops._tensors import kept_tensor

#: The factors of AGM's authors, by the number of modalities (lihong2303/AGM_ICCV2023).
_RATES = {2: (1.3, 0.7), 3: (0.9, 1.4, 0.7)}


@dataclass(frozen=True)
class LearningRatesResult:
    """The factors of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] c_m, in the order of `encoders`.
        scores: [M] batch mean of the true class's probability, which decides nothing.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    finite: Tensor


@dataclass(frozen=True)
class LearningRatesRule(Stateless):
    """The factors, in the order of the modalities."""

    rates: tuple[float, ...]

    result = LearningRatesResult
    need: ClassVar[Need] = Need()

    def sense(self, batch: Batch) -> Sensed:
        """Each modality's score, for the log alone."""
        return Sensed(batch.scores.prob)

    def check_takes(self, kind: Kind) -> None:
        """Takes coefficients, in the place of its own."""
        if kind == "ratios":
            raise TypeError("LearningRates has no ratios; give scores, or coefficients c_m")

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """The rates; 1 for a modality that is missing."""
        rates = kept_tensor(self.rates, (len(self.rates),), torch.float32, tensors.device)
        scores, rates = seen.means, rates.to(seen.means)
        if seen.paired:
            scores = own(seen.tables()[0])
            rates = torch.where(scores.isnan(), 1.0, rates)
        elif seen.kind == "coefficients":
            scores, rates = torch.full_like(scores, torch.nan), scores.nan_to_num(1.0)
        return Decision(Act(scale=tensors.each(rates)), (rates, scores))


class LearningRates(GradientMethod):
    """A constant factor on each encoder's gradient, a control for comparisons.

    With SGD it is a learning rate of the encoder's own; with an adaptive optimizer, which divides a
    factor out again, use ``apply_to="update"``, or parameter groups. It takes the logits that other
    methods take, so that one can stand in for the other.

    Fidelity: from the formulas.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        rates: c_m ≥ 0 for each modality: name → number, or numbers in the order of `encoders`. None
            for what AGM's authors took: 1.3 and 0.7 for two modalities (AV-MNIST), 0.9, 1.4 and 0.7
            for three (UR-Funny).
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`, or a rate is no number.
        ValueError: as `mmfuse.GradientMethod`, a rate is negative or not finite, or there is not
            one for each modality.
    """

    card: ClassVar[Card] = Card(
        "Yao & Mihalcea, Findings of ACL 2022", "gradient", ("logits",), (), golden=False
    )
    rule: LearningRatesRule

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        rates: Mapping[str, float] | Sequence[float] | None = None,
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(encoders, Mapping):
            kind = type(encoders).__name__
            raise TypeError(f"encoders must map names to modules, got {kind}")
        super().__init__(LearningRatesRule(_checked(rates, list(encoders))), encoders, **common)


def _checked(
    rates: Mapping[str, float] | Sequence[float] | None, names: list[str]
) -> tuple[float, ...]:
    if rates is None:
        if len(names) not in _RATES:
            raise ValueError(f"give rates, one for each of the {len(names)} modalities")
        return _RATES[len(names)]
    if isinstance(rates, Mapping):
        if set(rates) != set(names):
            raise ValueError(f"rates must name the modalities {names}, got {list(rates)}")
        rates = [rates[name] for name in names]
    check_sequence("rates", rates, "numbers")
    if len(rates) != len(names):
        raise ValueError(f"rates must hold one number for each of {names}, got {len(rates)}")
    for name, rate in zip(names, rates, strict=True):
        if not isinstance(rate, (int, float)) or isinstance(rate, bool):
            raise TypeError(f"the rate of {name!r} must be a number, got {type(rate).__name__}")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"the rate of {name!r} must be finite and at least 0, got {rate}")
    return tuple(map(float, rates))
