"""A learning rate for each encoder: the control that a balanced method has to beat.

Yao & Mihalcea, "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion",
Findings of ACL 2022, train every modality at a rate of its own. With SGD a rate is a factor on the
encoder's gradient. It stays the same for the whole training, or follows the modality's accuracy
on validation data, as the authors of AGM and of MLB run the method (MSLR):

    constant   g <- c_m g
    validated  g <- c_m (A_m / mean of the K before it) g,  A_m of the latest validation;
               c_m g until K + 1 are known

The paper's own way to its rates is left out: neither the paper nor its authors' code was seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._numbers import MOST_STEPS, whole
from ..loop._parameters import Encoders
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
from ..loop.given import Kind, Numbers, own_numbers
from ..loop.gradients import GradientMethod
from ..loop.pairs import own
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops._arguments import check_sequence
from ..ops._tensors import kept_tensor

#: The factors of AGM's authors, by the number of modalities (lihong2303/AGM_ICCV2023).
_RATES = {2: (1.3, 0.7), 3: (0.9, 1.4, 0.7)}


@dataclass(frozen=True)
class LearningRatesResult(Result):
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
    """The factors, in the order of the modalities; with a `window` of K, the validated ones."""

    rates: tuple[float, ...]
    window: int | None = None

    result = LearningRatesResult
    need: ClassVar[Need] = Need()

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """[K + 1, M] validation scores, the latest last; NaN where there is none yet."""
        if self.window is None:
            return {}
        return {"scores": torch.full((self.window + 1, modalities), math.nan).double()}

    def after(self, state: State, latest: Tensor) -> dict[str, Tensor]:
        """The state after one more validation."""
        before = state["scores"]
        return {"scores": torch.cat([before[1:], latest.to(before).unsqueeze(0)])}

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
        if self.window is not None:
            validated = state["scores"]
            # NaN before there are K + 1 validations.
            progress = (validated[-1] / validated[:-1].mean(0)).nan_to_num(1.0)
            rates = rates * progress.to(rates)
        if seen.paired:
            scores = own(seen.tables()[0])
            rates = torch.where(scores.isnan(), 1.0, rates)
        elif seen.kind == "coefficients":
            scores, rates = torch.full_like(scores, torch.nan), scores.nan_to_num(1.0)
        return Decision(Act(scale=tensors.each(rates)), (rates, scores))


class LearningRates(GradientMethod):
    """A factor on each encoder's gradient, a control for comparisons.

    With SGD it is a learning rate of the encoder's own; with an adaptive optimizer, which divides a
    factor out again, use ``apply_to="update"``, or parameter groups. It takes the logits that other
    methods take, so that one can stand in for the other. The factor is a constant, or with `window`
    follows the accuracies that `validated` gets::

        rates = mmfuse.LearningRates(encoders, window=5)
        for epoch in range(epochs):
            ...                                  # train
            rates.validated({"audio": 0.61, "visual": 0.40})

    Formulas: `mmfuse.methods.learningrates`. Tested against them.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        rates: c_m ≥ 0 for each modality: name → number, or numbers in the order of `encoders`. None
            for what AGM's authors took: 1.3 and 0.7 for two modalities (AV-MNIST), 0.9, 1.4 and 0.7
            for three (UR-Funny).
        window: K ≥ 1, how many validations before the latest one the mean is over: both releases
            take 5, MLB's 20 for CREMA-D. None for constant rates.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`, a rate is no number, or `window` no integer.
        ValueError: as `mmfuse.GradientMethod`, a rate is negative or not finite, there is not
            one for each modality, or `window` is out of range.
    """

    card: ClassVar[Card] = Card(
        "Yao & Mihalcea, Findings of ACL 2022", "gradient", ("logits",), (), golden=False
    )
    rule: LearningRatesRule

    def __init__(
        self,
        encoders: Encoders,
        *,
        rates: Mapping[str, float] | Sequence[float] | None = None,
        window: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(encoders, (Mapping, nn.ModuleDict)):
            kind = type(encoders).__name__
            raise TypeError(f"encoders must map names to modules, got {kind}")
        if window is not None:
            window = whole("window", window, 1, MOST_STEPS)
        rule = LearningRatesRule(_checked(rates, list(encoders)), window)
        super().__init__(rule, encoders, **common)

    def validated(self, scores: Numbers) -> None:
        """Takes each modality's accuracy, after a validation; give all ranks the same.

        Args:
            scores: Name → accuracy, or another metric that is positive and higher where the
                modality is better; NaN for one that was not validated, whose factor is c_m until
                the NaN has left the window.

        Raises:
            RuntimeError: the rates are constant.
            TypeError: a score is no number.
            ValueError: names do not fit, or a number is out of range.
        """
        if self.rule.window is None:
            raise RuntimeError(
                "LearningRates has constant rates; give window to make them follow validation"
            )
        device = self._state["scores"].device
        _, latest, _ = own_numbers(self.modalities.names, device, {"scores": scores}, None)
        self._state.set(self.rule.after(self._state, latest))


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
