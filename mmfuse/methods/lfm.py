"""LFM: learning to fuse the modality gap.

Yang, Wan, Jiang & Xu, "Facilitating Multimodal Classification via Dynamically Learning Modality
Gap", NeurIPS 2024; the formulas are those of the released code.

Modalities that fit the labels at different speeds drift apart. LFM first draws their predictions
together and turns to the labels later. With logits z^m of heads of their own, p_m = softmax(z^m)
and mu = (p_m + p_n) / 2:

    joint       z = mean of z^m
    alignment   A = mean over pairs m < n, over the batch, of  (KL(mu || p_m) + KL(mu || p_n)) / 2
    loss        L = 2 (lambda_0 CE(z) + lambda_1 A),   lambda_1 = 1 - lambda_0

lambda_0 rises with the epoch, by a polynomial that the authors fitted, or is learned: with h the
Hessian of lambda_0 CE + lambda_1 A times the gradient of CE, on samples that are not trained on,

    learning    lambda_1 <- clip(lambda_1 - eta mean(h), 0.05, 0.95)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .._numbers import finite, whole
from ..loop.contract import Card, Source
from ..loop.epochs import EpochWindowModule, typed_as
from ..loop.given import Loss, check_criterion
from ..loop.predictions import is_multilabel
from ..loop.ranks import Group, Observed, over_ranks
from ..loop.result import Entries, Result
from ..ops.logit_divergence import logit_divergence
from ._lfm_terms import Checked, Named, checked, joint_of, plain_divergence, terms_of
from ._lfm_weights import EPOCHS, label_weight, mean_along

Weighting = Literal["schedule", "learned"]

_LEAST, _MOST = 0.05, 0.95
# Between two epochs in which the rate of the learning is halved.
_HALVED = 20


@dataclass(frozen=True)
class LFMResult(Result):
    """The loss of one step and its parts; nothing here has waited for the device.

    Attributes:
        loss: 0-d L, in the place of the joint loss.
        joint: [B, …] z, the joint logits.
        coefficients: [2] lambda_0 and lambda_1.
        cross_entropy: 0-d CE(z).
        alignment: 0-d A.
    """

    loss: Tensor
    joint: Tensor
    coefficients: Tensor
    cross_entropy: Tensor
    alignment: Tensor

    entries: ClassVar[Entries] = {"coefficients": ("cross_entropy", "alignment")}


class LFM(EpochWindowModule):
    """LFM, in the place of the joint loss.

    ::

        model.lfm = mmfuse.LFM(epochs=200)
        for epoch in range(200):
            model.lfm.set_epoch(epoch)
            for batch, labels in loader:
                logits = {name: heads[name](f) for name, f in features.items()}  # of their own
                out = model.lfm(logits, labels)
                out.loss.backward()
                optimizer.step()

    The joint logits, in evaluation too, are the mean of the modalities'. Outside of `starts` …
    `ends` the loss is 2 CE(z), as where all weight is on the labels. Formulas:
    `mmfuse.methods.lfm`. Tested against them; `official()` against numbers that the authors' code
    computed.

    Args:
        epochs: Of the training, over which the schedule's 200 are spread; later ones keep the
            last one's weights.
        weighting: "schedule", or "learned" by `learn`, which begins with lambda_0 = 0.05.
        rate: eta of the learning.
        num_modalities: M ≥ 2; the paper has two.
        starts: First epoch in which predictions are aligned; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: As in `OPM`; learning averages mean(h) over the ranks.
        criterion: The loss of z and labels, with whatever it has: ``nn.CrossEntropyLoss``, or
            ``nn.BCEWithLogitsLoss``, where p is the yes and no of each output and A their mean;
            None for ``nn.CrossEntropyLoss()``.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: a number is no integer.
        ValueError: a hyper-parameter is out of range, or there is no such weighting.
    """

    _shown = ("epochs", "weighting", "rate")
    card: ClassVar[Card] = Card(
        "Yang et al., NeurIPS 2024",
        "loss",
        ("logits",),
        (Source("njustkmg/NeurIPS24-LFM at ad44fa0", golden=True),),
        golden=False,
    )
    #: `loss` stands in the place of the joint loss, and is not added to it.
    replaces_joint_loss: ClassVar[bool] = True
    #: Nothing is averaged over the ranks but, by DDP, gradients.
    decides_over_ranks: ClassVar[bool] = False
    _wide = ("weights", "learning_rate")
    criterion: Loss
    weights: Tensor
    learning_rate: Tensor
    # True if lambda_0 may leave [0, 1], as the released schedule does.
    _unbounded = False

    def __init__(
        self,
        epochs: int = EPOCHS,
        weighting: Weighting = "schedule",
        rate: float = 1e-4,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        criterion: Loss = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(epochs)
        if weighting not in ("schedule", "learned"):
            raise ValueError(f"weighting must be 'schedule' or 'learned', got {weighting!r}")
        if not (finite("rate", rate) and rate >= 0):
            raise ValueError(f"rate must be a finite number of at least 0, got {rate}")
        self.epochs: int = whole("epochs", epochs, least=1)
        self.weighting: Weighting = weighting
        self.rate: float = rate
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        self._begin(num_modalities, starts, ends, process_group, backend)
        self._begin_with("weights", [_LEAST, _MOST])
        self._begin_with("learning_rate", rate)
        self._go_to(None)

    @classmethod
    def official(
        cls,
        epochs: int = EPOCHS,
        weighting: Weighting = "schedule",
        rate: float = 1e-4,
        **keywords: Any,
    ) -> LFM:
        """The method as the authors' released code runs it.

        It takes the schedule as it is, which leaves [0, 1] in epochs 177 to 188 of 200: there
        lambda_0 is above 1 and the predictions are driven apart a little. The default stops at 0
        and 1.

        Tested against numbers that the authors' code computed (njustkmg/NeurIPS24-LFM at ad44fa0).

        Args:
            epochs: As in `LFM`.
            weighting: As in `LFM`.
            rate: As in `LFM`.
            **keywords: As in `LFM`.
        """
        made = cls(epochs, weighting, rate, **keywords)
        made._unbounded = True
        made._go_to(None)
        return made

    def _go_to(self, epoch: int | None) -> None:
        super()._go_to(epoch)
        if self.weighting == "schedule" and "weights" in self._buffers:
            # Beyond the run, in which it was fitted, the curve falls below 0.
            first = label_weight(min(self.epoch, self.epochs - 1) * EPOCHS / self.epochs)
            if not self._unbounded:
                first = min(max(first, 0.0), 1.0)
            self.weights[0].fill_(first)
            self.weights[1].fill_(1 - first)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, as in the other methods; in epochs 20, 40, … halves the learning's rate.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        before = self.epoch if self._told else None
        super().set_epoch(epoch)
        if before != self.epoch and self.epoch and self.epoch % _HALVED == 0:
            self.learning_rate.mul_(0.5)

    def forward(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        present: Mapping[str, Tensor] | None = None,
    ) -> LFMResult:
        """The loss of a batch; in `eval()` without labels the joint logits, and a loss of 0.

        Args:
            logits: Name → logits of each modality, of a head of its own: [B, C], [B, C, d1, …], or
                as `criterion` takes them.
            labels: [B] or [B, d1, …] class indices, or as `criterion` takes them. Places [d1, …]
                that it ignores have no part in A; a sample without a class has, which asks none.
            present: Name → [B] bool, which samples have the modality; None if all have all. z is
                the mean over those that a sample has, CE is over the samples that have any, and A
                over the pairs of modalities that some sample of this rank has, for each pair over
                the samples that have both.

        Returns:
            `LFMResult`, differentiable once in the logits.

        Raises:
            TypeError: logits, labels or masks have an unsupported type.
            ValueError: names, numbers or shapes do not fit.
        """
        if not self.training and labels is None:
            joint = joint_of(*self._checked(logits, present, compared=False))
            nothing = joint.new_zeros(())
            weights = self.weights.to(joint.dtype, copy=True)
            rest = weights, nothing, nothing
            return LFMResult(nothing, joint, *rest, modalities=tuple(logits))
        if not isinstance(labels, Tensor):
            raise TypeError("LFM needs labels, a tensor, in training")
        each, mask = self._checked(logits, present)
        if self.training:
            self._check_told("LFM")
        divergence = partial(logit_divergence, kind="mixture", backend=self.backend)
        told = self.criterion, each, labels, mask
        joint, cross_entropy, alignment = terms_of(*told, divergence)
        weights = self.weights.to(alignment.dtype, copy=True)  # the next epoch changes them
        if not self._acting:
            weights = torch.zeros_like(weights)
            weights[0] = 1.0
        loss = 2 * (weights[0] * cross_entropy + weights[1] * alignment)
        shown = (cross_entropy.detach(), alignment.detach())
        return LFMResult(loss, joint, weights, *shown, modalities=tuple(logits))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _checked(self, logits: Named, present: Named | None, compared: bool = True) -> Checked:
        self._check_named("logits", logits)
        return checked(logits, present, is_multilabel(self.criterion), compared)

    def learn(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        parameters: Sequence[Tensor],
        *,
        present: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Moves lambda, on samples that are not trained on; before each epoch, with "learned".

        The model must have second derivatives, which it costs three backward passes to take.

        Args:
            logits: As in `forward`, with gradients, of the held-out samples.
            labels: As there.
            parameters: The model's, none sharded, that of interest first: the release looks at the
                mean of h over its first tensor, the first weight of the audio encoder.
            present: As in `forward`.

        Raises:
            RuntimeError: the weights are a schedule's, or `set_epoch` was not called.
            TypeError: a parameter is sharded, or as `forward`.
            ValueError: there are no parameters, or as `forward`.
        """
        if self.weighting != "learned":
            raise RuntimeError('LFM learns its weights with weighting="learned" only')
        if not self._told:
            raise RuntimeError("LFM: call set_epoch(epoch) first; the rate depends on it")
        if not parameters:
            raise ValueError("parameters must hold at least one tensor")

        def look() -> tuple[None, Observed]:
            each, mask = self._checked(logits, present)
            _, loss, gap = terms_of(self.criterion, each, labels, mask, plain_divergence)
            step = mean_along(loss, gap, self.weights, list(parameters)).detach().to(self.weights)
            return None, Observed(step.view(1), torch.ones_like(step))

        step = over_ranks(look, self.process_group, 2, self.weights.device)[1].means[0]
        with torch.no_grad():
            moved = (self.weights[1] - self.learning_rate * step).clamp(_LEAST, _MOST)
            self.weights[1].copy_(moved)
            self.weights[0].copy_(1 - moved)
