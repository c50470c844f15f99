"""CGGM: classifier-guided gradient modulation.

Guo, Jin, Chen & Zhao, "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning",
NeurIPS 2024; the formulas are those of the released code.

Each modality has a classifier of its own, which learns from its detached feature and changes no
encoder. Its gain since the step before says how fast the modality learns, and an encoder whose
modality takes a large part of the progress is slowed:

    metric     e_m: accuracy over the batch, or the task's own metric, higher is better
    progress   Delta_m = e_m - e_m of the step before, which is 0 at first
    share      k_m = (sum_j Delta_j + eps - Delta_m) / (sum_j Delta_j + eps),  eps = 1e-8
    update     g <- rho k_m g
    direction  L = lambda / M (sum_m |k_m| - sum_m k_m cos(W_m, W)), added to the joint loss

k is 1 where nothing changes, and in [0, 1] where all metrics move the same way. Else it may be
anything: where two metrics move by +1/32 and -1/32 it is -3e6 and 3e6. Below 0 it turns the
gradient around, so that the encoder climbs: the release has it so, in the recorded steps down to
-2. W_m and W are the weights of the output layers of the classifiers and of the fusion; k in L is
that of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from .._numbers import flag
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
from ..loop.given import Kind
from ..loop.gradients import GradientMethod
from ..loop.modalities import check_names
from ..loop.pairs import own
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops._tensors import FLOATING
from ..ops.progress_factors import check_progress, progress_of_checked


@dataclass(frozen=True)
class CGGMResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] rho k_m, the factor of each encoder's gradients, in the order of
            `encoders`; 1 for a modality that no sample has.
        scores: [M] the metric e_m.
        progress: [M] Delta_m.
        shares: [M] k_m; NaN for a modality without another to compare with.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    progress: Tensor
    shares: Tensor
    finite: Tensor


@dataclass(frozen=True)
class CGGMRule(Stateless):
    """The equations above; `bound` None leaves k as it is, and `stale` takes earlier weights."""

    rho: float = 1.3
    bound: float | None = 2.0
    stale: bool = False

    result = CGGMResult
    need: ClassVar[Need] = Need(accuracy=True)

    def __post_init__(self) -> None:
        flag("stale", self.stale)
        check_progress(self.rho, self.bound)

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """The last metrics, over the samples that m and j have, and the last shares."""
        return {
            "scores": torch.zeros(modalities, modalities, dtype=torch.float64),
            "shares": torch.zeros(modalities, dtype=torch.float64),
        }

    def sense(self, batch: Batch) -> Sensed:
        """e_m."""
        return Sensed(batch.scores.prob)

    def check_takes(self, kind: Kind) -> None:
        """Takes coefficients, in the place of its own."""
        if kind == "ratios":
            raise TypeError("CGGM has no ratios; give scores, or coefficients rho k_m")

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """Delta_m and k_m: `mmfuse.reference.progress_factors` has the formulas."""
        if seen.kind == "coefficients":
            factors, nothing = seen.means.nan_to_num(1.0), torch.full_like(seen.means, torch.nan)
            return Decision(Act(scale=tensors.each(factors)), (factors, nothing, nothing, nothing))
        device = tensors.device
        scores = (seen.tables()[0] if seen.paired else seen.means).to(device)
        found = progress_of_checked(
            tensors.backend,
            scores,
            state["scores"].to(device),
            state["shares"].to(device),
            tensors.owner,
            float(self.rho),
            math.inf if self.bound is None else float(self.bound),
            tensors.dtype,
        )
        return Decision(
            Act(scale=found.scale),
            (found.coefficients, own(scores) if seen.paired else scores, *found[1:3]),
            {"scores": found.kept_scores, "shares": found.kept_shares},
        )


class CGGM(GradientMethod):
    """CGGM for a whole training run.

    ::

        heads = nn.ModuleDict({...})                       # a classifier for each modality
        head_optimizer = torch.optim.Adam(heads.parameters(), lr=5e-4)
        cggm = mmfuse.CGGM({"audio": audio_net, "visual": visual_net})
        for epoch in range(epochs):
            for batch, labels in loader:
                features, out = ...                        # and the joint logits
                logits = {name: heads[name](f.detach()) for name, f in features.items()}
                own_weights = {name: heads[name].weight for name in heads}
                loss = F.cross_entropy(out, labels)
                loss = loss + cggm.direction_loss(own_weights, fusion.weight)
                loss.backward()
                cggm.step(logits, labels)
                nn.utils.clip_grad_norm_(model.parameters(), 0.8)   # after the modulation
                optimizer.step()
                head_optimizer.zero_grad()                 # the classifiers' own optimizer
                sum(mmfuse.unimodal_losses(logits, labels).values()).backward()
                head_optimizer.step()

    For another task give its metric: ``cggm.step(scores={"audio": ..., "visual": ...})``, such as
    the share of right signs of a sentiment, or a mean Dice score. As everywhere scores must be
    positive; clamp those that may be 0 to 1e-12.

    Formulas: `mmfuse.methods.cggm`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        rho: Factor on all encoders' gradients; the authors use 1.3, or 1 for segmentation.
        bound: The largest |k_m|, at least 1, or None. k_m leaves [0, 1] where some metrics rise and
            others fall, and has no limit where they nearly cancel: with a batch of 32, one sample
            more and one fewer gives 3e6, which any clipping of the norm turns into a step of one
            encoder alone. 2, the default, is k of a modality that has lost as much as all
            together have gained; the bound is on either side of 0, since the release lets k turn a
            gradient around, for a modality that has gained more than all together.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Guo et al., NeurIPS 2024",
        "gradient",
        ("logits",),
        (Source("zrguo/CGGM at 21e428c", golden=True),),
        golden=False,
    )
    rule: CGGMRule
    # The weights that `direction_loss` was given last, where it wants those before.
    _kept: list[Tensor] | None = None

    def __init__(
        self,
        encoders: Encoders,
        *,
        rho: float = 1.3,
        bound: float | None = 2.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(CGGMRule(rho, bound), encoders, **common)

    @classmethod
    def official(
        cls,
        encoders: Encoders,
        *,
        rho: float = 1.3,
        bound: float | None = None,
        **common: Unpack[Common],
    ) -> CGGM:
        """The method as the authors' released code runs it.

        k has no bound. `direction_loss`, called once in each step, is that of the weights in the
        step before, and so is its gradient: the release makes it there and adds it one step late.
        Its script for segmentation scales nothing, since no parameter has the names it looks for.

        Tested against numbers that the authors' code computed (zrguo/CGGM at 21e428c).
        """
        made = cls(encoders, rho=rho, bound=bound, **common)
        made._adopt(CGGMRule(rho, bound, stale=True))
        return made

    def direction_loss(
        self, classifier_weights: Mapping[str, Tensor], output_weight: Tensor, weight: float = 0.2
    ) -> Tensor:
        """The direction term, to be added to the joint loss.

        It pulls the fusion's output layer towards the classifiers' by how the last step has
        modulated each modality, and reaches nothing else. 0 before the first step, and in epochs
        in which the method does not act.

        Args:
            classifier_weights: Name → weight of the output layer of each modality's classifier.
            output_weight: That of the fusion, of the same shape.
            weight: λ; the authors use 0.2, or 0.05 (Food-101) and 0.1 (segmentation).

        Returns:
            0-d loss.

        Raises:
            TypeError: a weight is no floating tensor.
            ValueError: names or shapes do not fit.
        """
        names = self.modalities.names
        check_names("classifier_weights", classifier_weights, names, "encoders")
        given = {f"classifier_weights[{name!r}]": classifier_weights[name] for name in names}
        for what, tensor in [("output_weight", output_weight), *given.items()]:
            if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{what} must be a floating tensor, got {kind}")
            if tensor.shape != output_weight.shape:
                raise ValueError(
                    f"{what} must have the shape of output_weight, {list(output_weight.shape)}, "
                    f"got {list(tensor.shape)}"
                )
        classifiers = torch.stack([tensor.detach().flatten() for tensor in given.values()])
        if self.rule.stale:
            now = [classifiers, output_weight.detach().clone()]
            kept, self._kept = self._kept or now, now
            # Their numbers, with the gradient of what is there now.
            classifiers, output_weight = kept[0], kept[1] + (output_weight - output_weight.detach())
        k = self._state["shares"].to(output_weight)
        k = k.clone() if self._acting else torch.zeros_like(k)
        cosines = F.cosine_similarity(classifiers, output_weight.flatten().unsqueeze(0), dim=1)
        return weight * (k.abs().sum() - (k * cosines).sum()) / len(names)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; with `official` the weights of the step before as well."""
        found = super().state_dict()
        return found if self._kept is None else {**found, "weights": list(self._kept)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: as for other methods; nothing has been changed then.
        """
        super().load_state_dict(state_dict)
        kept = state_dict.get("weights")
        self._kept = None if kept is None else [w.detach().clone() for w in kept]
