"""MLB: multi-loss balanced training.

Kontras, Chatzichristos, Blaschko & De Vos, "Improving Multimodal Learning with Multi-Loss Gradient
Modulation", BMVC 2024; the formulas are those of the released code.

The network is trained on the sum of the joint loss and of every modality's own, and each encoder's
gradient gets a factor that slows a modality which is ahead and speeds up one which is behind:

    score   s_m = mean over the batch of p_i^m, the true class's probability
    ratio   rho_m = mean of the other s_j / s_m;  above 1 for a modality that is behind
    factor  k_m = 1 + (beta - 1) tanh(alpha (rho_m - 1))   if rho_m > 1
            k_m = 1 + tanh(alpha (rho_m - 1))              else
    update  g <- k_m g

With beta = 2 both cases are one formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._numbers import finite
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
    Source,
    State,
    Stateless,
    Tensors,
)
from ..loop.gradients import GradientMethod
from ..loop.pairs import mean_ratio, stages
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops.modulation_factors import factors_before_update, factors_of_checked


@dataclass(frozen=True)
class MLBResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] k_m, in the order of `encoders`.
        scores: [M] batch mean of the true class's probability.
        ratios: [M] rho_m.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    ratios: Tensor
    finite: Tensor


@dataclass(frozen=True)
class MLBRule(Stateless):
    """The equations above, of paper and released code alike."""

    alpha: float = 0.8
    beta: float = 2.0

    result = MLBResult
    need: ClassVar[Need] = Need(factors=True)

    def __post_init__(self) -> None:
        if not (finite("alpha", self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a finite number of at least 0, got {self.alpha}")
        if not (finite("beta", self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be a finite number of at least 0, got {self.beta}")

    def sense(self, batch: Batch) -> Sensed:
        """s_m."""
        return Sensed(batch.scores.prob)

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """rho_m and k_m."""
        if seen.paired or seen.kind != "scores":
            scores, ratios, given = stages(seen, lambda table: mean_ratio(table.T))
            if given is None:
                change = torch.tanh(self.alpha * (ratios - 1))
                # NaN, of a score of 0 / 0 or one that is missing, tells nothing about a lead.
                given = 1 + torch.where(ratios > 1, (self.beta - 1) * change, change)
            k = torch.where(given.isnan(), 1.0, given)
            return Decision(Act(scale=tensors.each(k)), (k, scores, ratios))
        means, started = seen.means.to(tensors.device), None
        rule = means, self.alpha, "mlb", tensors.owner, None, 0.0
        if tensors.fused is not None:
            factors, started = factors_before_update(tensors.fused[0], *rule, beta=self.beta)
        else:
            factors = factors_of_checked(tensors.backend, *rule, beta=self.beta)
        report = factors.coefficients, seen.means, factors.ratios
        return Decision(Act(scale=factors.scale), report, started=started)


class MLB(GradientMethod):
    """MLB for a whole training run.

    ::

        mlb = mmfuse.MLB({"audio": audio_net, "visual": visual_net})
        for epoch in range(epochs):
            for batch, labels in loader:
                out, logits = ...                  # of the joint head, and of each modality alone
                loss = F.cross_entropy(out, labels)
                loss = loss + sum(F.cross_entropy(z, labels) for z in logits.values())
                mlb.backward(loss, logits, labels)
                optimizer.step()

    Formulas: `mmfuse.methods.mlb`. Tested against numbers that the authors' code computed, for two
    modalities and three.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. The released code
            scales the weight of each modality's own linear head as well: name it among the
            parameters, ``{"audio": [*audio_net.parameters(), audio_head.weight], ...}``.
        alpha: Strength α, at least 0; the authors use 0.5 to 2.
        beta: β, the largest factor of a modality that is behind; 10, 1 or 0.5 in the authors' runs.
            Below 1 it slows both sides.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Kontras et al., BMVC 2024",
        "gradient",
        ("logits",),
        (Source("kkontras/MLB at 357b5ce", golden=True),),
        golden=True,
        own_losses=True,
    )
    rule: MLBRule

    def __init__(
        self,
        encoders: Encoders,
        *,
        alpha: float = 0.8,
        beta: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(MLBRule(alpha, beta), encoders, **common)

    @classmethod
    def official(
        cls,
        encoders: Encoders,
        *,
        alpha: float = 0.8,
        beta: float = 2.0,
        **common: Unpack[Common],
    ) -> MLB:
        """MLB as the authors' released code runs it: the same, in epochs 0 to 1500 inclusive.

        Tested against numbers that the authors' code computed (kkontras/MLB at 357b5ce).
        """
        settings: Common = {"starts": 0, "ends": 1500}
        settings.update(common)
        return cls(encoders, alpha=alpha, beta=beta, **settings)
