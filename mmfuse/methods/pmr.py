"""PMR: prototypical modal rebalance.

Fan, Xu, Wang, Wang & Guo, "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023.

Every class has a prototype in each modality's feature space. The nearer samples are to those of
their classes, the further the modality has come. One that is behind is drawn towards its
prototypes, one that is ahead is kept uncertain early on; both are terms beside the joint loss:

    prototype  c_k^m = mean feature of class k;  c <- eps c + (1 - eps) c_new  in later epochs
    posterior  pi_i^m = softmax over k of -|phi_i^m - c_k^m|
    score      S_m = mean over the batch of pi_i^m of the true class
    ratio      rho_m = S_m / (smallest other S_j)
    behind     k_m = clip((largest other S_j) / S_m - 1, 0, 1)
    ahead      e_m = clip(rho_m - 1, 0, 1)
    loss       alpha sum_m k_m PCE_m - mu sum_m e_m H_m

PCE is the mean of -log pi of the true class, H the mean entropy of pi; the entropies are added in
early epochs only. For two modalities this is the paper's (its beta and gamma are k_0 and k_1, and
e_0 = k_1, e_1 = k_0); for more it is our extension.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._numbers import whole
from ..loop.contract import Card, Source
from ..loop.epochs import typed_as
from ..loop.given import check_present
from ..loop.pairs import own
from ..loop.ranks import Group, Observed, over_ranks
from ..ops.modality_scores import named_scores
from ._pmr_present import Seen, look_at_present
from ._pmr_prototypes import IGNORED, PrototypeModule
from ._pmr_rule import (
    PMRReleased,
    PMRResult,
    PMRRule,
    check_labels,
    mean_entropy,
    prototype_ratios,
    similarities,
)

__all__ = ["PMR", "PMRResult"]

_NEXT = "call update_prototypes(batches) before the first epoch, and between epochs"


class PMR(PrototypeModule):
    """PMR, a term beside the joint loss.

    ::

        model.pmr = mmfuse.PMR()               # part of the model, so that eval() reaches it
        for epoch in range(epochs):
            model.eval()                       # from a tenth of the training data, say
            model.pmr.update_prototypes((encode(x), y) for x, y in some_batches)
            model.train()
            model.pmr.set_epoch(epoch)
            for images, sounds, labels in loader:
                features = {"audio": audio_net(sounds), "visual": visual_net(images)}
                joint = F.cross_entropy(head(torch.cat(list(features.values()), 1)), labels)
                (joint + model.pmr(features, labels).loss).backward()

    Prototypes are buffers, of no gradient. A class keeps its prototype while it has no sample; one
    that never had any has no part in the posterior, and its samples do not count. In `eval()` the
    loss is 0, and nothing is looked at.

    Formulas: `mmfuse.methods.pmr`. Tested against them, and numbers transcribed from them;
    `official()` against numbers that the authors' code computed, which has neither clip nor
    entropy. Three modalities and more are our extension.

    Args:
        alpha: α ≥ 0; the authors use 1 and 2.
        mu: μ ≥ 0, of the entropies; the authors use 0.01 and 0.001. 0 leaves them out.
        momentum: ε in [0, 1], the share of the old prototypes; 0.2 in the released code.
        entropy_epochs: How many epochs have the entropies, from 0 on; None for all. The paper has
            them in an early stage, of a length that goes with the data.
        num_classes: C; None for what the labels of the first `update_prototypes` need.
        widths: How many values a sample has in each modality, in the order of `features`; None for
            what the first `update_prototypes` shows. With both the buffers have their shape at
            once, which `torch.distributed.checkpoint` needs to read into them.
        num_modalities: M ≥ 2.
        starts: First epoch in which something is added; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples prototypes and scores are means over: None for all
            where torch.distributed is initialized, False for this rank alone.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a number is no integer.
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Fan et al., CVPR 2023",
        "loss",
        ("features",),
        (Source("fanyunfeng-bit/Modal-Imbalance-PMR at 3615e48", golden=True),),
        golden=False,
    )
    rule: PMRRule
    # True if the entropies are added in this epoch, if μ is above 0.
    _entropic = True
    entropy_epochs: int | None = None

    def __init__(
        self,
        alpha: float = 1.0,
        mu: float = 0.01,
        momentum: float = 0.2,
        *,
        entropy_epochs: int | None = None,
        num_classes: int | None = None,
        widths: Sequence[int] | None = None,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(alpha)
        self.rule = PMRRule(alpha, mu, momentum)
        if entropy_epochs is not None:
            self.entropy_epochs = whole("entropy_epochs", entropy_epochs, least=0)
        self._begin(num_modalities, starts, ends, process_group, backend)
        self._begin_prototypes(num_classes, widths)

    @classmethod
    def official(
        cls,
        alpha: float = 1.0,
        mu: float = 0.0,
        momentum: float = 0.2,
        *,
        ends: int | None = 100,
        **keywords: Any,
    ) -> PMR:
        """The method as the authors' released code runs it, for its tables; two modalities.

        The modality behind gets α, however little it is, the other 0; nothing is clipped. There is
        no entropy; with a μ above 0 it is added as in the paper. A class without a sample makes its
        prototype NaN, for ever, and with it every loss; the released code takes a tenth of the
        batches, at least one. Epochs 0 to 100 inclusive. Its runs take a momentum of 0; 0.2 is the
        default of its command line. For AVE and CG-MNIST it takes prototypes from validation data.

        Tested against numbers that the authors' code computed (fanyunfeng-bit/Modal-Imbalance-PMR
        at 3615e48). Three modalities and more are from the formulas: each modality behind some
        other gets α.

        Args:
            alpha: As in `PMR`.
            mu: As in `PMR`; 0 in the released code.
            momentum: As in `PMR`.
            ends: As in `PMR`.
            **keywords: As in `PMR`.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        made = cls(alpha, mu, momentum, ends=ends, **keywords)
        made.rule = PMRReleased(alpha, mu, momentum)
        return made

    def forward(
        self,
        features: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
    ) -> PMRResult:
        """The term to add to the loss of a batch.

        Args:
            features: Name → [B, …] for the M modalities. Results [M] are in the order of those
                that the prototypes come from.
            labels: [B] class indices; rows labelled −100 do not count. Not needed in `eval()`.
            present: Name → [B] bool, which samples have the modality; None if all have all. Two
                modalities are compared over the samples that have both, and a loss is of those that
                have its modality; a class without a prototype counts as missing in that one alone.
                A modality that shares samples (of any rank) with no other has the coefficient 0.

        Returns:
            `PMRResult`, whose loss is differentiable in the features, once.

        Raises:
            RuntimeError: there are no prototypes yet.
            TypeError: an input has an unsupported type, or is missing.
            ValueError: names, numbers, shapes or labels do not fit.
        """
        nothing = self.prototypes[0].new_zeros(self.num_modalities)
        if not self.training:
            return PMRResult(nothing.sum(), nothing, modalities=tuple(self.names or features))
        self._check_told("PMR")
        count = self.num_modalities
        (logits, scores, counted), seen = over_ranks(
            lambda: self._look(features, labels, present),
            self.process_group,
            count + 1 if present is None else 2 * count**2,
            self.epoch_state.device,
        )
        self._remember(logits)
        means = seen.tables()[0] if seen.paired else seen.means
        ratios, behind = prototype_ratios(means)
        means = own(means) if seen.paired else means
        # The means are NaN for a batch in which nothing counts.
        losses = torch.where(scores.count > 0, -scores.log_prob, 0.0)
        shown = PMRResult(
            *(nothing.sum(), nothing, means, ratios, losses.detach()), modalities=tuple(logits)
        )
        if not self._acting:
            return replace(shown, prototype_logits=logits)
        k = self.rule.coefficients(behind).nan_to_num(0.0)
        # A loss with k = 0 adds nothing, even if it is NaN or infinite.
        loss = torch.where(k > 0, self.rule.weights(k) * losses, 0.0).sum()
        entropies = None
        if self.rule.mu and self._entropic:
            each = zip(logits.values(), counted, strict=True)
            entropies = torch.stack([mean_entropy(z, rows) for z, rows in each]).to(losses)
            e = (ratios - 1).clamp(0, 1).nan_to_num(0.0)
            loss = loss - self.rule.mu * torch.where(e > 0, e * entropies, 0.0).sum()
            entropies = entropies.detach()
        return replace(
            shown, loss=loss, coefficients=k, entropies=entropies, prototype_logits=logits
        )

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _look(
        self,
        features: Mapping[str, Tensor],
        labels: Tensor | None,
        present: Mapping[str, Tensor] | None,
    ) -> tuple[Seen, Observed]:
        """Distances, their scores, and which rows count; S_m of this rank; with all checks."""
        ordered = self._features(features)
        names, values = list(ordered), list(ordered.values())
        if not self._ready:
            raise RuntimeError(f"PMR has no prototypes yet; {_NEXT}")
        if labels is None:
            raise TypeError("PMR needs labels in training; call eval() to pass through")
        check_labels(labels, len(values[0]))
        if present is not None:
            mask = check_present(names, present, len(labels), labels.device)
            told = self.prototypes, self.rule.masks, self.backend
            return look_at_present(names, values, labels, mask, *told)
        logits, known = {}, None
        for name, value, prototypes in zip(names, values, self.prototypes, strict=True):
            logits[name], here = similarities(name, value, prototypes, self.rule.masks)
            known = here if known is None else known & here
        if self.rule.masks and known is not None:  # a class without prototype is no target
            possible = (labels >= 0) & (labels < len(known))
            place = torch.where(possible, labels, 0).long()
            labels = torch.where(possible & ~known[place], IGNORED, labels)
        called = [f"prototype_logits[{name!r}]" for name in names]
        scores = named_scores(called, list(logits.values()), labels, self.backend)
        counted = (labels != IGNORED).expand(len(names), -1)
        return (logits, scores, counted), Observed(scores.prob.detach(), scores.count)

    def _check_told(self, method: str, needed: bool = False) -> None:
        """Warns, once, if the entropies should end but no epoch was given, too."""
        super()._check_told(method, needed)
        if self._told or self._warned or self.entropy_epochs is None:
            return
        self._warned = True
        warnings.warn(
            f"{method} was made with entropy_epochs={self.entropy_epochs}, but set_epoch was never "
            "called: every epoch counts as the first; call set_epoch(epoch) in each",
            RuntimeWarning,
            stacklevel=3,
        )

    def _go_to(self, epoch: int | None) -> None:
        super()._go_to(epoch)
        self._entropic = self.entropy_epochs is None or self.epoch < self.entropy_epochs
