"""AGM: adaptive gradient modulation.

Li, Li, Hu, Lei, Li & Zhou, "Boosting Multi-modal Model Performance with Adaptive Gradient
Modulation", ICCV 2023; the formulas are those of the released code.

For any fusion: each modality's response is its Shapley share of the joint logits, with the inputs
of the others masked (`mmfuse.shapley_responses`), and the gradient that enters a response is scaled
by how far its modality is ahead, compared with how far it has been ahead so far:

    response  z = sum of r_m
    score     s_m = -mean over the batch of log softmax(r_m)[y];  lower for a modality that is ahead
    ratio     rho_m = exp(M / (M - 1) (mean_j s_j - s_m));  above 1 for a modality that is ahead
    usual     tau_m = the same of S_m, the mean of s_m over all earlier steps; 0 in the first
    factor    k_m = exp(alpha min(tau_m - rho_m, cap))
    backward  dL/dr_m <- k_m dL/dr_m

so that the encoder and its share of the fusion are slowed alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindowModule, typed_as
from ..loop.given import Loss, More, Numbers, check_criterion, makes_tables
from ..loop.ranks import Group, Observed, over_ranks
from ..loop.shards import is_dtensor
from ..ops._forward import check_forward
from ..ops.scale_grad import scale_grad
from ._agm_rule import AGMResult, AGMRule, look_at

__all__ = ["AGM", "AGMResult"]


class AGM(EpochWindowModule):
    """AGM, on each modality's response.

    ::

        model.agm = mmfuse.AGM()               # part of the model, so that eval() reaches it
        for images, sounds, labels in loader:
            inputs = {"audio": sounds, "visual": images}
            responses = mmfuse.shapley_responses(model, inputs)
            out = model.agm(responses, labels)
            loss = F.cross_entropy(sum(out.logits.values()), labels)
            loss.backward()

    The forward pass keeps its values; evaluate the model as it is. Outside of its epochs, and in
    `eval()`, coefficients are 1, but S_m goes on in every training step. A step with a score that
    is not finite does not enter S_m, and its coefficients are 1.

    S_m, their number of steps and the last coefficients are buffers, in float64 whatever the module
    is cast to; S_m is kept for the samples that m shares with each modality, [M, M], with those of
    all its own on the diagonal.

    Formulas: `mmfuse.methods.agm`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        alpha: Strength α, at least 0; the authors use 1 to 2.5.
        cap: The most that tau_m − rho_m counts, so that k_m ≤ exp(α·cap): 10 in the authors' script
            for CREMA-D, 7 for UR-Funny, None (no limit) for AV-MNIST and AVE.
        num_modalities: M ≥ 2.
        starts: First epoch in which gradients are modulated; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples the scores are averaged over: None for all where
            torch.distributed is initialized, False for this rank alone.
        criterion: The loss that logits and labels are for, as in `mmfuse.GradientMethod`.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a number is no integer.
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Li et al., ICCV 2023",
        "logits",
        ("logits",),
        (Source("lihong2303/AGM_ICCV2023 at 5a65542", golden=True),),
        golden=False,
        scales_back=True,
    )
    _wide = ("running_scores", "coefficients")
    rule: AGMRule
    criterion: Loss
    running_scores: Tensor
    running_steps: Tensor
    coefficients: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        cap: float | None = 10.0,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        criterion: Loss = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(alpha)
        self.rule = AGMRule(alpha, cap)
        self._begin(num_modalities, starts, ends, process_group, backend)
        count = self.num_modalities
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        self.register_buffer("running_scores", torch.zeros(count, count, dtype=torch.float64))
        self.register_buffer("running_steps", torch.zeros(count, count, dtype=torch.int64))
        self._begin_with("coefficients", [1.0] * count)
        self._begin_names()

    @classmethod
    def official(
        cls,
        alpha: float = 1.0,
        cap: float | None = 10.0,
        *,
        floor: float | None = None,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = 19,
        **keywords: Any,
    ) -> AGM:
        """The method as the authors' released code runs it.

        After the last epoch of the window coefficients are no longer updated, but the last ones
        stay in force. Probabilities below 1e-8 count as 1e-8 where there are two modalities. After
        the backward pass it clips gradients in a way of its own, which is `clip_`.

        Tested against numbers that the authors' code computed (lihong2303/AGM_ICCV2023 at 5a65542),
        for two modalities and three. Four and more are from the formulas.

        Args:
            alpha: As in `AGM`.
            cap: As in `AGM`; their script for two modalities in the golden numbers has None, that
                for three has 7.
            floor: Probabilities below it count as it; None for 1e-8 with two modalities and 0 with
                more, as released.
            num_modalities: As in `AGM`.
            starts: As in `AGM`.
            ends: As in `AGM`. The authors count epochs from 1, and modulate up to their 20th.
            **keywords: As in `AGM`.
        """
        made = cls(alpha, cap, num_modalities=num_modalities, starts=starts, ends=ends, **keywords)
        least = (1e-8 if num_modalities == 2 else 0.0) if floor is None else floor
        made.rule = AGMRule(alpha, cap, least, stays=True)
        return made

    def forward(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
        scores: Numbers | None = None,
        count: Tensor | float | None = None,
    ) -> AGMResult:
        """Passes the responses on, with other gradients.

        Args:
            logits: Name → [B, C] response of each of the M modalities, as `shapley_responses` gives
                them, or other logits that add up to the joint ones.
            labels: [B] class indices, or as `criterion` takes them; rows of −100 do not count. Not
                needed in `eval()`.
            present: Name → [B] bool, which samples have the modality; None if all have all. Two
                modalities are compared over the samples that have both, also in S_m. One that
                shares samples (of any rank) with no other has the coefficient 1.
            scores: Name → a positive number, higher is better, in the place of the true class's
                probability: for other tasks, such as `mmfuse.scores.inverse_error`. No labels then;
                NaN for a modality that is missing.
            count: Their weight among those of other ranks; 1 without it.

        Returns:
            `AGMResult`, differentiable in the logits.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: an input has an unsupported type, or is missing; nothing has been changed.
            ValueError: numbers, shapes or labels do not fit; nothing has been changed.
        """
        if not self.training:
            passed = self._ordered(logits)
            return AGMResult(passed, torch.ones_like(self.coefficients), modalities=tuple(passed))
        check_forward("AGM", self.epoch_state, "and would count the step twice")
        if labels is None and scores is None:
            raise TypeError(
                "AGM needs labels in training; call eval() to pass through, or give scores"
            )
        if labels is not None and scores is not None:
            raise TypeError("AGM got scores and labels; give one of them")
        self._check_told("AGM")
        more: More = {"present": present, "scores": scores, "count": count}
        with torch.no_grad():
            size, paired = self.num_modalities, makes_tables(more)
            passed, seen = over_ranks(
                lambda: self._look(logits, labels, more),
                self.process_group,
                2 * size**2 if paired else size + 1,
                self.running_scores.device,
            )
            self._remember(passed)
            shared = (seen.count > 0).view(size, size) if paired else None
            table = -seen.means.to(self.running_scores).view(size, -1).expand(-1, size)
            ratios = self.rule.ratios(table, shared)
            usual = self.rule.ratios(self.running_scores, shared)
            k = self._decide(table, shared, ratios, usual)
        if self._acting or self.rule.stays:
            for name, each in zip(passed, k.unbind(), strict=True):
                passed[name] = scale_grad(passed[name], each, backend=self.backend)
        return AGMResult(passed, k, table.diagonal(), ratios, usual, modalities=tuple(passed))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _ordered(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_named("logits", logits)
        return dict(self._in_order("logits", logits))

    def _look(
        self, logits: Mapping[str, Tensor], labels: Tensor | None, more: More
    ) -> tuple[dict[str, Tensor], Observed]:
        ordered = self._ordered(logits)
        told = more, self.criterion, self.running_scores.device, self.backend
        return ordered, look_at(self.rule, ordered, labels, *told)

    def _decide(
        self, table: Tensor, shared: Tensor | None, ratios: Tensor, usual: Tensor
    ) -> Tensor:
        """k_m in force, with S_m brought up to date."""
        good = table.isfinite()
        counts = good.all() if shared is None else (good | ~shared).all() & shared
        k = self.rule.coefficients(ratios, usual)
        k = torch.where(counts.any() & ~k.isnan(), k, 1.0)
        after = self.running_steps + counts
        share = counts / after.clamp(min=1).to(table)
        kept = self.running_scores * (1 - share) + table.nan_to_num(0, 0, 0) * share
        self.running_scores.copy_(kept)
        self.running_steps.copy_(after)
        last, alone = self.coefficients, None if shared is None else ratios.isnan()
        if self._acting:  # without a partner a modality keeps its last value
            last.copy_(k if alone is None else torch.where(alone, last, k))
            return k
        if not self.rule.stays:
            return torch.ones_like(k)
        return last.clone() if alone is None else torch.where(alone, 1.0, last)

    @torch.no_grad()
    def clip_(
        self, parameters: Iterable[Tensor], head_weight: Tensor, limit: float | None = None
    ) -> Tensor:
        """Clips gradients as the released code does, between backward pass and optimizer.

        If an entry of the last layer's weight gradient lies outside ±limit, all gradients are made
        smaller so that their global norm is at most `limit`; the device is not waited for.

        Args:
            parameters: Of the whole model.
            head_weight: The weight of the last layer.
            limit: None for that of the released scripts: 1 for two modalities, 5 for more.

        Returns:
            0-d bool, whether gradients were clipped.

        Raises:
            TypeError: gradients are sharded.
            ValueError: `head_weight` has no gradient, or `limit` is not positive.
        """
        most = (1.0 if self.num_modalities == 2 else 5.0) if limit is None else limit
        if not most > 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if head_weight.grad is None:
            raise ValueError("head_weight has no gradient: call clip_ after the backward pass")
        grads = [p.grad for p in parameters if p.grad is not None]
        if any(map(is_dtensor, [*grads, head_weight.grad])):
            raise TypeError("clip_ needs whole gradients, got DTensors; use clip_grad_norm_")
        found = (head_weight.grad.abs() > most).any()
        norm = torch.nn.utils.get_total_norm(grads)
        factor = torch.where(found, (most / (norm + 1e-6)).clamp(max=1.0), 1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device, grad.dtype))
        return found
