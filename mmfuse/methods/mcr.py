"""MCR: the multimodal competition regularizer.

Kontras, Strypsteen, Chatzichristos, Liang, Blaschko & De Vos, "Balancing Multimodal Training
Through Game-Theoretic Regularization", NeurIPS 2025; the formulas are those of the released code.

A modality contributes if the prediction changes where its features are exchanged among the samples
of a batch. Every encoder plays to raise its own contribution, and lowers, ignores or raises those
of the others. With z the joint logits, and z~m those with modality m permuted:

    contribution  J_m = Jensen-Shannon divergence of softmax(z~m) and softmax(z), batch mean
    play          encoder m gets the gradient of  -lambda (J_m + k sum_{j != m} J_j);
                  k = -1 greedy, 0 independent, 1 collaborative
    contrast      N = supervised NT-Xent loss of all modalities' features, at a temperature
    loss          CE(z) + sum_m CE(z^m) + play + c N

The paper's third term, a bound on what features hold beyond the task, has weight 0 in the released
configurations and is left out. For three modalities the release has another game, with pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .._numbers import MOST_STEPS, finite, whole
from ..loop.contract import Card, Source
from ..loop.drawing import DrawingModule
from ..loop.epochs import typed_as
from ..loop.given import Loss, check_criterion, check_present
from ..loop.modalities import check_names, named_features
from ..loop.predictions import (
    check_alike,
    flat_distributions,
    is_multilabel,
    mean_where,
    present_only,
)
from ..loop.ranks import Group
from ..loop.result import Result
from ..noise import NoiseStream
from ..ops._forward import check_forward
from ..ops.logit_divergence import logit_divergence
from ._mcr_parts import (
    added,
    labels_of_contrast,
    nt_xent,
    orders_of,
    repeated,
    through,
    weighted,
)

Strategy = Literal["greedy", "independent", "collaborative"]

_WEIGHT_OF_OTHERS: dict[str, int] = {"greedy": -1, "independent": 0, "collaborative": 1}


@dataclass(frozen=True)
class MCRResult(Result):
    """The loss of one step and its parts; nothing here has waited for the device.

    Attributes:
        loss: 0-d, to be added to the other losses; 0 in `eval()`.
        contributions: [M] J_m, in the order of `features`; NaN for a modality that no sample has.
        contrast: 0-d N.
    """

    loss: Tensor
    contributions: Tensor
    contrast: Tensor


class MCR(DrawingModule):
    """MCR, a loss beside the joint and the unimodal ones.

    ::

        model.mcr = mmfuse.MCR()
        features = {"audio": audio_net(sounds), "visual": visual_net(images)}
        logits = mmfuse.unimodal_logits(head, features)   # of an affine head: they add up
        loss = F.cross_entropy(head(torch.cat(list(features.values()), 1)), labels)
        loss = loss + sum(mmfuse.unimodal_losses(logits, labels).values())
        loss = loss + model.mcr(features, logits, labels).loss

    With a fusion whose logits do not add up, give the head: ``model.mcr(features, logits, labels,
    head=head)``; it then sees M (`permutations` + 1) batches, with "greedy" twice as many.

    Formulas: `mmfuse.methods.mcr`. Tested against them, and `official()` likewise.

    Args:
        strength: lambda, the weight of the play; the authors take 0.01 for CREMA-D.
        strategy: "greedy", "independent" or "collaborative", their k.
        contrast: c, the weight of the contrastive loss; 0 leaves it out, and labels with it.
        temperature: Of the contrastive loss.
        permutations: How many permutations of a batch J_m is a mean over.
        num_modalities: M ≥ 2.
        starts: First epoch in which there is a loss; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks, each of which permutes its own part of the batch.
        stream: As in `ModalityDropout`.
        name: As there.
        criterion: The loss that the joint logits are for: ``nn.BCEWithLogitsLoss`` if each is a yes
            or no of its own; labels that ``nn.CrossEntropyLoss`` ignores are ignored here, too.
        backend: Name of a backend; None for the best one.

    Raises:
        ValueError: a hyper-parameter is out of range, or there is no such strategy.
    """

    _shown = ("strength", "strategy", "contrast", "temperature", "permutations")
    card: ClassVar[Card] = Card(
        "Kontras et al., NeurIPS 2025",
        "loss",
        ("features", "logits"),
        (Source("kkontras/MCR at 338d370", golden=False),),
        golden=False,
        own_losses=True,
    )
    #: Nothing is averaged over the ranks but, by DDP, gradients.
    decides_over_ranks: ClassVar[bool] = False
    criterion: Loss
    # True if J_m's gradient leaves the unpermuted prediction alone, as the released play does.
    _released = False

    def __init__(
        self,
        strength: float = 0.01,
        strategy: Strategy = "greedy",
        contrast: float = 1.0,
        temperature: float = 0.5,
        permutations: int = 32,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        stream: NoiseStream | None = None,
        name: str | None = None,
        criterion: Loss = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(strength)
        self._begin(num_modalities, starts, ends, process_group, backend)
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        if not isinstance(strategy, str) or strategy not in _WEIGHT_OF_OTHERS:
            known = ", ".join(map(repr, _WEIGHT_OF_OTHERS))
            raise ValueError(f"strategy must be one of {known}, got {strategy!r}")
        for what, value in (("strength", strength), ("contrast", contrast)):
            if not (finite(what, value) and value >= 0):
                raise ValueError(f"{what} must be a finite number of at least 0, got {value}")
        if not (finite("temperature", temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive finite number, got {temperature}")
        self.strength: float = strength
        self.strategy: Strategy = strategy
        self.contrast: float = contrast
        self.temperature = temperature
        self.permutations: int = whole("permutations", permutations, 1, MOST_STEPS)
        self._begin_stream(stream, name)

    @classmethod
    def official(
        cls, strength: float = 0.01, strategy: Strategy = "greedy", **keywords: Any
    ) -> MCR:
        """The terms as the released code computes them, for two modalities.

        There J_m's gradient goes through the unpermuted prediction as well, without the weight k:
        with "greedy" it cancels between the two terms of each contribution. The released function
        computes the sum of its terms and returns the loss without it; here it is added. Its
        features for the permutations come from another pass, in evaluation mode; these here are
        those that you give.

        Tested against the formulas of the authors' code (kkontras/MCR at 338d370).

        Args:
            strength: As in `MCR`.
            strategy: As in `MCR`.
            **keywords: As in `MCR`.

        Raises:
            ValueError: as `MCR`, or there are more than two modalities.
        """
        made = cls(strength, strategy, **keywords)
        if made.num_modalities != 2:
            raise ValueError("MCR.official is for num_modalities=2; MCR takes more")
        made._released = True
        return made

    def forward(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> MCRResult:
        """The loss of a batch.

        Args:
            features: Name → [B, …] for the M modalities; those of the contrast have one size.
            logits: Name → [B, C], [B, C, d1, …] or as `criterion` takes them, whose sum are the
                joint logits; not used with `head`. Neither they nor labels are needed in `eval()`.
            labels: [B] class indices, for the contrast; rows labelled −100 do not count.
            head: From the concatenated features [B, ΣD_m], in their order, to the joint logits, if
                it is not affine. It gets the gradient of −λ ΣJ_m, with "greedy" none, as released.
            present: Name → [B] bool, which samples have the modality; None if all have all. J_m is
                of the samples that have m, among which alone it is exchanged. A missing m adds
                nothing to the joint logits, or is 0 for the head, and has no part in the contrast.

        Returns:
            `MCRResult`, differentiable once in the logits, or with `head` in the features.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: an input has an unsupported type, or labels are missing.
            ValueError: names, numbers or shapes do not fit.
        """
        names, values = named_features("MCR", features, self.num_modalities)
        nothing = values[0].new_zeros(())
        without = MCRResult(nothing, nothing.expand(len(names)), nothing, modalities=tuple(names))
        if not self.training:
            return without
        if logits is None and head is None:
            raise TypeError("MCR needs logits or a head in training; call eval() for a loss of 0")
        mask = None
        if present is not None:
            mask = check_present(names, present, len(values[0]), values[0].device)
            values = present_only(values, mask)
        each = []
        if head is None:
            assert logits is not None
            check_names("logits", logits, names, "features")
            each = [logits[name] for name in names]
            check_alike(names, each, is_multilabel(self.criterion), len(values[0]))
            each = each if mask is None else present_only(each, mask)
        if self.contrast:
            labels = labels_of_contrast(labels, names, values, self.criterion)
        if not self._acting:
            self._check_told("MCR")
            self._advance()
            return without
        check_forward("MCR", self.epoch_state, "and would draw other permutations there")
        self._check_told("MCR")
        parts = each if head is None else values
        fuse = added if head is None else through(head, is_multilabel(self.criterion))
        divergences = self._divergences(parts, fuse, mask)
        if head is not None and self.strategy == "greedy":
            still = self._divergences([p.detach() for p in parts], fuse, mask)
            divergences = divergences - (still - still.detach())  # of the head's parameters alone
        loss = -self.strength * divergences.sum()
        contrast = torch.zeros_like(loss)
        if self.contrast:
            assert labels is not None
            contrast = nt_xent([v.flatten(1) for v in values], labels, self.temperature, mask)
            loss = loss + self.contrast * contrast
        self._advance()
        shown = divergences if mask is None else torch.where(mask.any(1), divergences, torch.nan)
        return MCRResult(loss, shown.detach(), contrast.detach(), modalities=tuple(names))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _divergences(
        self, parts: Sequence[Tensor], fuse: Callable[..., Tensor], mask: Tensor | None
    ) -> Tensor:
        """[M] J_m, with gradients in which the other modalities have weight k; 0 of no sample."""
        k, rows = _WEIGHT_OF_OTHERS[self.strategy], len(parts[0])
        stream, start = self.agreed_stream(), self.first_row(rows) * self.permutations
        permuted, plain = [], []
        for m, part in enumerate(parts):
            drawn = stream.uniform(rows * self.permutations, stream_id=m, offset=start)
            drawn = drawn.view(self.permutations, rows).to(part.device)
            order = orders_of(drawn, None if mask is None else mask[m])
            mine = [p if j == m else weighted(p, k) for j, p in enumerate(parts)]
            of_order = [
                p[order].flatten(0, 1)
                if j == m
                else p.repeat(self.permutations, *[1] * (p.dim() - 1))
                for j, p in enumerate(mine)
            ]
            permuted.append(fuse(of_order))
            whole_batch = list(parts) if self._released else mine
            joint = fuse(whole_batch)
            if self._released and k == -1:
                joint = joint.detach()
            plain.append(repeated(joint, self.permutations))
        multilabel = is_multilabel(self.criterion)
        pair = ([flat_distributions(z, multilabel) for z in side] for side in (permuted, plain))
        if mask is None:
            return logit_divergence(*pair, kind="js", backend=self.backend)
        found = logit_divergence(*pair, kind="js", per_row=True, backend=self.backend)
        each = found.view(len(parts), self.permutations, rows, -1)
        here = mask.view(len(parts), 1, rows, 1).expand_as(each)
        return mean_where(each.flatten(1), here.flatten(1))
