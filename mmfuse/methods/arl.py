"""ARL: asymmetric representation learning.

Wei, Luo & Luo, "Improving Multimodal Learning via Imbalanced Learning", ICCV 2025. The formulas are
those of the released code.

An encoder learns faster if its modality has less influence on the joint prediction and is surer of
its own: the gradient that enters its feature is made larger. From each modality's logits alone:

    magnitude  v_m = mean over the batch of sum_c abs(z_m), as a share of all modalities'
    entropy    H_m = mean over the batch of the entropy of softmax(z_m), a share of at least 0.6 / M
    certainty  u_m = (1 / H_m) / sum_j (1 / H_j)
    weight     w_m = softmax over m of T u_m mean over j != m of v_j
    backward   dL/dphi_m <- (1 + w_m) dL/dphi_m

The network is trained on the joint loss and gamma times every modality's own. For two modalities
this is the release's; the mean over the others and the floor 0.6 / M are our extension to more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindowModule, typed_as
from ..loop.given import Loss, check_criterion
from ..loop.modalities import check_names
from ..loop.ranks import Group, Observed, over_ranks
from ..ops._forward import check_forward
from ..ops.scale_grad import scale_grad
from ._arl_rows import look_at
from ._arl_rule import ARLResult, ARLRule

__all__ = ["ARL", "ARLResult"]


class ARL(EpochWindowModule):
    """ARL, between the encoders and the fusion of their features.

    ::

        model.arl = mmfuse.ARL()               # part of the model, so that eval() reaches it
        for images, sounds, labels in loader:
            features = {"audio": audio_net(sounds), "visual": visual_net(images)}
            with torch.no_grad():              # only to decide from
                logits = mmfuse.unimodal_logits(head, features)
            features = model.arl(features, logits, labels).features
            logits = mmfuse.unimodal_logits(head, features)
            losses = mmfuse.unimodal_losses(logits, labels, weights=model.arl.loss_weight)
            joint = F.cross_entropy(head(torch.cat(list(features.values()), 1)), labels)
            (joint + sum(losses.values())).backward()

    Take all losses from the features that it returns: their values are as they were, and what does
    not go through them is not scaled. In `eval()` features pass, and logits are not looked at.
    If something in the logits is not finite, nothing is scaled.

    Formulas: `mmfuse.methods.arl`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        temperature: T ≥ 0, how far the weights are apart.
        gamma: γ ≥ 0, the weight of the unimodal losses within the window; see `loss_weight`. 4 in
            the authors' script for CREMA-D.
        num_modalities: M ≥ 2.
        starts: First epoch in which gradients are scaled; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples are averaged over: None for all where
            torch.distributed is initialized, False for this rank alone.
        criterion: The loss that logits and labels are for. Class weights and `ignore_index` of an
            ``nn.CrossEntropyLoss`` say how much a row counts; with an ``nn.BCEWithLogitsLoss`` H_m
            is the sum of the entropies of all outputs, each a yes or no.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: `criterion` is none of these, or a number is no integer.
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Wei et al., ICCV 2025",
        "feature",
        ("features", "logits"),
        (
            Source("shicaiwei123/ICCV2025-ARL at 51a9de3", golden=True, release="later"),
            Source("shicaiwei123/ICCV2025-ARL at adfc58c", golden=True, release="july"),
        ),
        golden=False,
        own_losses=True,
        scales_back=True,
    )
    _wide = ("weights",)
    rule: ARLRule
    criterion: Loss
    weights: Tensor

    def __init__(
        self,
        temperature: float = 8.0,
        gamma: float = 4.0,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        criterion: Loss = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature)
        self.rule = ARLRule(temperature, gamma)
        self._begin(num_modalities, starts, ends, process_group, backend)
        count = self.num_modalities
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        self._begin_with("weights", [1 / count] * count)
        self._begin_names()

    @classmethod
    def official(
        cls,
        temperature: float = 8.0,
        gamma: float = 4.0,
        *,
        release: Literal["later", "july"] = "later",
        starts: int = 6,
        **keywords: Any,
    ) -> ARL:
        """The method as the authors' released code runs it; theirs is for two modalities.

        `later` assigns a step's weights after its forward pass, so that they act in the next one;
        in the first step of the window, as after one outside of it, all weights are 1 / M. `july`,
        the first release, computes the weights but never assigns them: they stay 1 / M. Its
        function for the backward pass multiplies a tuple by a tensor, which stops; here it does
        what the later one does. Epochs 0 to 5 are left alone (call `set_epoch`), and the weight of
        the unimodal losses is 1 in them. Unimodal logits come from the whole head, with zeros for
        the other feature. Afterwards both clip the gradients' norm to 40 (`clip_grad_norm_`).

        Tested against numbers that the authors' code computed (shicaiwei123/ICCV2025-ARL at
        51a9de3), and numbers that the authors' code computed (shicaiwei123/ICCV2025-ARL at
        adfc58c). Three modalities and more are from the formulas.

        Args:
            temperature: As in `ARL`.
            gamma: As in `ARL`.
            release: Which of the two.
            starts: As in `ARL`.
            **keywords: As in `ARL`.

        Raises:
            ValueError: there is no such release.
        """
        if release not in ("later", "july"):
            raise ValueError(f"release must be 'later' or 'july', got {release!r}")
        made = cls(temperature, gamma, starts=starts, **keywords)
        made.rule = ARLRule(temperature, gamma, release)
        return made

    @property
    def loss_weight(self) -> float:
        """The weight of the unimodal losses in this epoch: γ within the window, else 1."""
        return self.rule.gamma if self._acting else 1.0

    def forward(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
    ) -> ARLResult:
        """Passes the features on, with larger gradients.

        Args:
            features: Name → [B, …] for the M modalities.
            logits: Name → [B, C] logits of each feature alone, or as `criterion` takes them. Not
                needed in `eval()`.
            labels: [B] class indices, or as `criterion` takes them; rows labelled −100 do not
                count. None for all rows, and no scores.
            present: Name → [B] bool, which samples have the modality; None if all have all. Two
                modalities are compared over the samples that have both. One that shares samples (of
                any rank) with no other has the coefficient 1, and keeps its last weight.

        Returns:
            `ARLResult`, differentiable in the features.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: an input has an unsupported type, or is missing; nothing has been changed.
            ValueError: names, numbers, shapes or labels do not fit; nothing has been changed.
        """
        if not self.training:
            passed = self._features(features)
            return ARLResult(passed, torch.ones_like(self.weights), modalities=tuple(passed))
        check_forward("ARL", self.epoch_state, "where another step's weights would act")
        if logits is None:
            raise TypeError("ARL needs logits in training; call eval() to pass through")
        self._check_told("ARL")
        count, device = self.num_modalities, self.weights.device
        kinds = 2 if labels is None else 3
        width = kinds * count + 1 if present is None else (kinds + 1) * count**2
        with torch.no_grad():
            passed, seen = over_ranks(
                lambda: self._look(features, logits, labels, present),
                *(self.process_group, width, device),
            )
            self._remember(passed)
            means = seen.means.to(self.weights)
            if present is None:
                entropies, magnitudes, *scores = means.view(kinds, count)
                new, *shown = self.rule.decide(magnitudes, entropies)
                some = torch.ones_like(new, dtype=torch.bool)
            else:
                entropies, magnitudes, *tables = means.view(kinds, count, count)
                shared = seen.count.view(count, count) > 0
                compared = shared & ~torch.eye(count, dtype=torch.bool, device=device)
                new, *shown = self.rule.decide_by_pairs(magnitudes, entropies, compared)
                some = compared.any(1)
                scores = [table.diagonal() for table in tables]
            used = self.rule.in_force(new, self.weights.clone())
            even = torch.full_like(new, 1 / count)
            if self._acting:
                acts = (used.isfinite() | ~some).all() & some
                k = torch.where(acts, 1 + used, 1.0)
                kept = torch.where((new.isfinite() | ~some).all(), new, even)
                self.weights.copy_(torch.where(some, kept, self.weights))
            else:
                k = torch.ones_like(new)
                self.weights.copy_(even)
        if self._acting:
            for name, each in zip(passed, k.unbind(), strict=True):
                passed[name] = scale_grad(passed[name], each, backend=self.backend)
        shown_scores = scores[0] if scores else None
        return ARLResult(passed, k, shown_scores, new, *shown, modalities=tuple(passed))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _look(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor],
        labels: Tensor | None,
        present: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], Observed]:
        """The features; entropies, magnitudes and scores of this rank; with all checks."""
        ordered = self._features(features)
        names, rows = list(ordered), len(next(iter(ordered.values())))
        check_names("logits", logits, names, "features")
        each, told = [logits[name] for name in names], (self.criterion, self.backend)
        return ordered, look_at(names, each, labels, present, rows, *told)
