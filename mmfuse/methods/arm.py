"""ARM: asymmetric reinforcing of modalities.

Gao, Cao, Zhu, Wang & Hu, "Asymmetric Reinforcing against Multi-modal Representation Bias",
AAAI 2025.

ARM gives a larger weight to a modality that contributes less to the fused representation c. The
contribution is the information that it shares with c, with and without the others. The feature of
each modality m and c are taken as B·D paired values, in equal bins over their ranges:

    nmi_m  = 2 I(m; c) / (H(m) + H(c))                         30 bins
    ncmi_m = 2 I(m; c | j) / (H(m | j) + H(c | j)), mean over j != m   2 bins
    P_m    = p_c nmi_m + (mean over j != m of p_j) (nmi_m - ncmi_m)
    weight = mean over j != m of P_j / P_m

with p the batch mean of the true class's probability, for the fused and for each modality's own
logits. Weights are detached. For two modalities this is the paper's (P_a / P_v) phi_v and
(P_v / P_a) phi_a; the sums over j are our extension to more.

The balanced min-max loss that the paper's summary names has no released formula; it is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._numbers import real
from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindowModule, typed_as
from ..loop.given import Loss, More, anywhere, check_criterion, complete_scores, criterion_of
from ..loop.modalities import check_names
from ..loop.ranks import Group, Observed, over_ranks
from ..ops._forward import in_backward, in_forward
from ..ops.modality_scores import named_scores
from ..ops.sample_scores import named_sample_scores
from ._arm_information import Complete
from ._arm_missing import complete, is_more, left_alone, shown
from ._arm_rule import ARMResult, ARMRule, modality_contributions, modality_weights, weighted

__all__ = ["ARM", "ARMResult", "modality_contributions", "modality_weights"]


class ARM(EpochWindowModule):
    """ARM, between the encoders and the head.

    ::

        model.arm = mmfuse.ARM()               # part of the model, so that eval() reaches it
        features = {"audio": audio_net(sounds), "visual": visual_net(images)}   # [B, D] each
        fused = neck(torch.cat([features["audio"], features["visual"]], 1))     # [B, D]
        logits = {name: classifier(f) for name, f in features.items()}
        out = model.arm(features, fused, logits, classifier(fused), labels)
        loss = F.cross_entropy(head(torch.cat(list(out.features.values()), 1)), labels)

        model.eval()                           # and model.train() after the evaluation
        out = model.arm(features)

    In `eval()` no labels are needed: the weights are then the bias-corrected moving average of
    those of training, a buffer (1 before the first step). So are those of a batch in which a
    modality contributes nothing; neither it nor one that lacks a modality enters the average.

    Formulas: `mmfuse.methods.arm`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        bins: Of the mutual information, from 1 to 256.
        conditional_bins: Of the conditional mutual information, from 1 to 32.
        num_modalities: M ≥ 2.
        momentum: Of the weights' moving average, in [0, 1).
        starts: First epoch in which features are weighted; `ends` is the last, None for no end.
        ends: See there, and `set_epoch`.
        process_group: As in `OPM`: scores and information, which each rank estimates from its own
            samples, are averaged over the ranks in training.
        criterion: The loss that logits and labels are for, as in `mmfuse.GradientMethod`.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a number is no integer.
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Gao et al., AAAI 2025",
        "feature",
        ("features", "fused", "logits"),
        (Source("Gao-xiyuan/ARM at a96d0ad", golden=True),),
        golden=False,
    )
    rule: ARMRule
    _wide = ("average", "average_weight")
    criterion: Loss
    average: Tensor
    average_weight: Tensor

    def __init__(
        self,
        bins: int = 30,
        conditional_bins: int = 2,
        *,
        num_modalities: int = 2,
        momentum: float = 0.9,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        criterion: Loss = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(bins)
        self._begin(num_modalities, starts, ends, process_group, backend)
        self.rule = ARMRule(bins, conditional_bins)
        if not 0 <= real("momentum", momentum) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        self.register_buffer("average", torch.zeros(num_modalities, dtype=torch.float64))
        self.register_buffer("average_weight", torch.zeros((), dtype=torch.float64))
        self._begin_names()

    @classmethod
    def official(cls, bins: int = 30, conditional_bins: int = 2, **keywords: Any) -> ARM:
        """The method as the authors' released code runs it; theirs is for two modalities.

        Its conditional entropy divides the joint probabilities by p(z) along an axis that is not
        z's and does not weight by it (see `mmfuse.methods._arm_information.released_ncmi`). After a
        ReLU ncmi stays near 1 then, P_m may be negative, and the weights of either sign or
        infinite; nothing is clamped. In `eval()` it needs the labels of the test set too. The
        weights are detached, so that only your network can give the layer to `fused` a gradient.

        Tested against numbers that the authors' code computed (Gao-xiyuan/ARM at a96d0ad). Three
        modalities and more are from the formulas.

        Args:
            bins: As in `ARM`.
            conditional_bins: As in `ARM`.
            **keywords: As in `ARM`.
        """
        from ._arm_released import ARMReleased

        made = cls(bins, conditional_bins, **keywords)
        made.rule = ARMReleased(bins, conditional_bins)
        return made

    def forward(
        self,
        features: Mapping[str, Tensor],
        fused: Tensor | None = None,
        logits: Mapping[str, Tensor] | None = None,
        fused_logits: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Unpack[More],
    ) -> ARMResult:
        """Weights the features of a batch.

        Args:
            features: Name → [B, …] for the M modalities, of one shape.
            fused: The fused representation c, of the same shape; like all below, for training.
            logits: Name → [B, C] logits of each modality alone.
            fused_logits: [B, C] logits of c.
            labels: [B] class indices, or as `criterion` takes them; rows of −100 do not count.
            **more: As in `mmfuse.GradientMethod`. With ``present`` everything is estimated from the
                samples that have all modalities, but for those that the whole batch (of all ranks)
                lacks: these weigh 1 and are left out of the others. ``scores`` are the p_m, with
                p_c by the name "fused", in place of logits and labels.

        Returns:
            `ARMResult`, differentiable in the features. A value that is NaN or infinite makes its
            modality's weight NaN (and the others', which are relative to it).

        Raises:
            TypeError: an input has an unsupported type, or is missing.
            ValueError: names, numbers or shapes do not fit, the batch is empty, or a label is out
                of range. Nothing has been changed then.
        """
        if not self.training and self.rule.averages:
            average = self._average()
            out = weighted(self._features(features), average)
            return ARMResult(out, average, modalities=tuple(out))
        given = logits is not None and fused_logits is not None and labels is not None
        if fused is None or not (given or more.get("scores") is not None):
            raise TypeError("ARM needs fused, logits, fused_logits and labels in training")
        if self.training:
            self._check_told("ARM")
        with torch.no_grad():
            count = self.num_modalities
            group = self.process_group if self.training else False
            here = self._here(features, logits, labels, more, group) if is_more(more) else None
            ordered, seen = over_ranks(
                lambda: self._look(features, fused, logits, fused_logits, labels, more, here),
                group,
                3 * count + 2,
                self.average.device,
            )
            # A checkpointed forward pass, repeated in the backward pass, counts once.
            learns = self.training and (torch.compiler.is_compiling() or not in_backward())
            if learns:
                self._remember(ordered)
            nmi, ncmi, scores = seen.means.split([count, count, count + 1])
            contributions = modality_contributions(nmi, ncmi, scores[:-1], scores[-1], here)
            average, known = self._average(), seen.count > 0
            weights, counts = self.rule.weights(contributions, average, here)
            if here is not None:
                weights, counts = left_alone(weights, counts, here, known, average)
            elif self.rule.averages:  # a batch without a labelled row says nothing
                weights, counts = torch.where(known, weights, average), counts & known
            if self.training and not self._acting:
                weights = torch.ones_like(weights)
            if learns:
                sound = in_forward(counts & weights.isfinite().all())  # a NaN would stay for ever
                share = sound.to(weights.dtype) * (1 - self.momentum)
                self.average.add_(share * (weights.nan_to_num(0, 0, 0) - self.average))
                # Compiled by PyTorch 2.13, an update of the 0-d tensor itself would be lost.
                self.average_weight.view(1).add_(share * (1 - self.average_weight))
        out = weighted(ordered, weights)
        seen_of = [scores[:-1], contributions, nmi, ncmi]
        if here is not None:
            seen_of = [torch.where(here, x, torch.nan) for x in seen_of]
        return ARMResult(out, weights, *seen_of, modalities=tuple(out))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _here(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None,
        labels: Tensor | None,
        more: More,
        group: Group,
    ) -> Tensor:
        """[M] bool, the modalities that some sample of some rank has."""
        count, device = self.num_modalities, self.average.device

        def look() -> tuple[None, Observed]:
            ordered = self._features(features)
            return None, anywhere(shown(ordered, count, logits, labels, more).mask)

        return over_ranks(look, group, count + 1, device)[1].means > 0

    def _look(
        self,
        features: Mapping[str, Tensor],
        fused: Tensor,
        logits: Mapping[str, Tensor] | None,
        fused_logits: Tensor | None,
        labels: Tensor | None,
        more: More,
        here: Tensor | None,
    ) -> tuple[dict[str, Tensor], Observed]:
        """The features; nmi_m, ncmi_m, p_m and p_c of this rank; with all checks."""
        ordered = self._features(features)
        names, values = list(ordered), list(ordered.values())
        if logits is not None:
            check_names("logits", logits, names, "features")
        rows = scores = counted = None
        if here is not None:
            who = shown(ordered, len(names), logits, labels, more)
            rows, scores = who.rows(here), who.scores(here)
            counted = complete(here, rows, values[0])
        nmi, ncmi = self._information(names, values, fused, counted)
        if scores is None:
            assert logits is not None and fused_logits is not None and labels is not None
            called = [*(f"logits[{name!r}]" for name in names), "fused_logits"]
            every = [*(logits[name] for name in names), fused_logits]
            how = criterion_of(self.criterion)
            if rows is None:
                scores = named_scores(called, every, labels, self.backend, how)
            else:
                samples = named_sample_scores(called, every, labels, self.backend, how)
                scores = complete_scores(samples, rows)
        return ordered, Observed(torch.cat([nmi, ncmi, scores.prob.to(nmi.dtype)]), scores.count)

    def _information(
        self,
        names: Sequence[str],
        features: Sequence[Tensor],
        fused: Tensor,
        counted: Complete | None,
    ) -> tuple[Tensor, Tensor]:
        for name, value in zip((*names, "fused"), (*features, fused), strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is not a tensor but {type(value).__name__}")
            if value.shape != features[0].shape:
                raise ValueError(
                    "features and fused are compared value by value and must have one shape: "
                    f"features[{names[0]!r}] is {list(features[0].shape)}, "
                    f"{name} {list(value.shape)}"
                )
        rows = [value.reshape(1, -1) for value in (*features, fused)]
        nmi, ncmi = self.rule.information(rows, self.backend, counted)
        return nmi.squeeze(1), ncmi.squeeze(1)

    def _average(self) -> Tensor:
        started = self.average_weight > 0
        return torch.where(started, self.average / self.average_weight, 1.0)
