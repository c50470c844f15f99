"""OPM: on-the-fly prediction modulation.

Wei, Hu, Du & Wen, "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024.

OGM slows the dominant modality in the backward pass; OPM weakens it in the forward pass: its
feature is dropped, sample by sample, with a probability that rises with its dominance, so that the
joint prediction has to do without it and the other encoder gets the gradient:

    score        S_m = mean over the batch of p_i^m, from the undropped features
    ratio        rho_m = mean over j != m of S_m / S_j
    probability  q_m = min(1, q_base (1 + lam tanh(rho_m - 1)))  if rho_m > 1, else 0
    drop         phi_i^m <- 0 with probability q_m

q is that of the previous step, 0 in the first. The weakest modality has rho <= 1, hence q = 0: no
sample loses all its modalities, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..loop.contract import Card, Source
from ..loop.drawing import DrawingModule
from ..loop.epochs import typed_as
from ..loop.given import Loss, More, check_criterion, look, makes_tables
from ..loop.modalities import check_names
from ..loop.pairs import stages
from ..loop.ranks import Group, Observed, over_ranks
from ..noise import NoiseStream
from ..ops._forward import check_forward
from ..ops.discrepancy_ratios import discrepancy_ratios
from ._opm_rule import Given, OPMResult, OPMRule, drop_probabilities, with_one_left

__all__ = ["OPM", "OPMResult", "drop_probabilities"]


class OPM(DrawingModule):
    """OPM, between the encoders and the fusion.

    ::

        model.opm = mmfuse.OPM()               # part of the model, so that eval() reaches it
        for images, sounds, labels in loader:
            features = {"audio": audio_net(sounds), "visual": visual_net(images)}
            logits = mmfuse.unimodal_logits(head, features)
            kept = model.opm(features, logits, labels).features
            loss = F.cross_entropy(head(torch.cat(list(kept.values()), 1)), labels)
            mmfuse.ogm_backward(loss, encoders, logits, labels)   # or loss.backward()
        model.eval()                           # and model.train() after the evaluation

    OPM and OGM see the logits of the undropped features; together they are the paper's OPM + OGM.
    In `eval()` the features pass unchanged, and logits and labels are not looked at.

    One launch reads and writes every feature once. q and the noise stream, which the mask comes
    from, are buffers.

    Formulas: `mmfuse.methods.opm`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        q_base: Probability at which a modality that is just dominant is dropped, in [0, 1].
        lam: λ ≥ 0, how much it rises with dominance.
        num_modalities: M ≥ 2.
        starts: First epoch in which features are dropped; see `set_epoch`.
        ends: Last such epoch; None for no end.
        process_group: The ranks whose samples the scores are averaged over: None for all where
            torch.distributed is initialized, False for this rank alone. With ranks of one batch
            size B, sample i of rank r draws the number of sample r·B + i of the whole batch.
        criterion: The loss that logits and labels are for, as in `mmfuse.GradientMethod`.
        stream: The random stream, whose state becomes a buffer; None makes one from
            `torch.initial_seed()` and `name`, at step 0. In a distributed run all take the first's.
        name: Of this object, where there are several: their streams differ by it.
        backend: Name of a backend; None for the best one.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Wei et al., TPAMI 2024",
        "feature",
        ("features", "logits"),
        (Source("GeWu-Lab/BML_TPAMI2024 at 4b3aa4f", golden=True),),
        golden=False,
    )
    rule: OPMRule
    criterion: Loss
    q: Tensor

    def __init__(
        self,
        q_base: float = 0.5,
        lam: float = 0.5,
        *,
        num_modalities: int = 2,
        starts: int = 0,
        ends: int | None = None,
        process_group: Group = None,
        criterion: Loss = None,
        stream: NoiseStream | None = None,
        name: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(q_base)
        self.rule = OPMRule(q_base, lam)
        self._begin(num_modalities, starts, ends, process_group, backend)
        object.__setattr__(self, "criterion", check_criterion(criterion))  # no module of this one
        self.register_buffer("q", torch.zeros(num_modalities, dtype=torch.float32))
        self._begin_names()
        self._begin_stream(stream, name)

    @classmethod
    def official(
        cls,
        q_base: float = 0.5,
        lam: float = 0.5,
        p_exe: float = 0.7,
        *,
        theta_gradient: bool = True,
        starts: int = 6,
        **keywords: Any,
    ) -> OPM:
        """The method as the authors' released code runs it, to reproduce its tables.

        q is that of the same step; features are dropped in a share `p_exe` of the steps only; all
        that is left, gradients included, is divided by 1 − θ with θ = Σ d_m q_m / Σ d_m over the
        features' widths d_m; samples that have lost everything are removed, which makes shapes
        dynamic and waits for the device; epochs 0 to 5 are left alone (call `set_epoch`). q has
        the module's dtype: in a float64 network call ``.double()`` on it.

        The released code's division has a backward pass of its own, which passes θ itself back to
        θ, and from there to the features through their scores: the gradient of an additional loss
        θ²/2, whatever the loss is scaled by. The features get it as well, the head does not.

        Tested against numbers that the authors' code computed (GeWu-Lab/BML_TPAMI2024 at 4b3aa4f),
        alone and with OGM-GE. Three modalities and more are from the formulas.

        Args:
            q_base: As in `OPM`.
            lam: As in `OPM`.
            p_exe: Share of the steps in which features are dropped, in [0, 1].
            theta_gradient: True if the features get θ's gradient, as they do in the released code.
                It takes one more pass, forth and back, between features and scores; `logits` that
                do not come from `features` pass nothing back.
            starts: As in `OPM`.
            **keywords: As in `OPM`. The first number of the stream's id after the modalities'
                decides if a step drops.

        Raises:
            ValueError: a hyper-parameter is out of range.
        """
        from ._opm_released import OPMReleased

        made = cls(q_base, lam, starts=starts, **keywords)
        made.rule = OPMReleased(q_base, lam, p_exe, theta_gradient)
        return made

    def forward(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        **more: Unpack[More],
    ) -> OPMResult:
        """Drops dominant modalities, sample by sample.

        Args:
            features: Name → [B, …] for the M modalities.
            logits: Name → [B, C] logits of each undropped feature alone. Not needed in `eval()`.
            labels: [B] class indices; rows labelled −100 do not count. Not needed in `eval()`.
            **more: As in `mmfuse.GradientMethod`: with ``present`` no sample loses the last feature
                that it has; a feature that it lacks passes as it is, also in `eval()`, so that you
                set it to zero for your head. ``coefficients`` are the q_m of this very step.

        Returns:
            `OPMResult`, differentiable in the features.

        Raises:
            RuntimeError: it is called in a backward pass, by activation checkpointing.
            TypeError: an input has an unsupported type, or is missing; nothing has been changed.
            ValueError: names, numbers, shapes or labels do not fit; nothing has been changed.
        """
        if not self.training:
            passed = self._features(features)
            first = next(iter(passed.values()))
            keep = first.new_ones(len(passed), len(first), dtype=torch.bool)
            q = torch.zeros_like(self.q)
            return OPMResult(passed, keep, q, None, None, modalities=tuple(passed))
        check_forward("OPM", self.epoch_state, "and would draw another mask there")
        if not more and (logits is None or labels is None):
            raise TypeError("OPM needs logits and labels in training; call eval() to pass through")
        self._check_told("OPM")
        with torch.no_grad():
            (given, present), seen = over_ranks(
                lambda: self._look(features, logits, labels, more),
                self.process_group,
                self._width(more),
                self.q.device,
            )
            self._remember(given.names)
            current, scores, ratios = self._decide(seen)
        at_once = self.rule.same_step or seen.kind == "coefficients"
        q = current.detach() if at_once else self.q.clone()
        q = q if self._acting else torch.zeros_like(q)
        result = self.rule.drop(self, given._replace(scores=scores, present=present), q)
        self.q.copy_(current.detach())
        self._advance()
        return replace(result, scores=scores, ratios=ratios, modalities=tuple(given.names))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102

    def _look(
        self,
        features: Mapping[str, Tensor],
        logits: Mapping[str, Tensor] | None,
        labels: Tensor | None,
        more: More,
    ) -> tuple[tuple[Given, Tensor | None], Observed]:
        """The input, the masks, and S_m on this rank; with all checks."""
        ordered = self._features(features)
        names, values = list(ordered), list(ordered.values())
        called = [f"logits[{name!r}]" for name in names]
        rows = values[0].shape[0]
        if isinstance(labels, Tensor) and labels.dim() and len(labels) != rows:
            raise ValueError(f"labels has {len(labels)} rows, features[{names[0]!r}] {rows}")
        if logits is not None:
            check_names("logits", logits, names, "features")
        looked = look(
            names, called, logits, labels, more, self.criterion, self.q.device, self.backend
        )
        each = [] if logits is None else [logits[name] for name in names]
        given = Given(names, values, each, labels, self.q)
        scores = looked.scores
        if scores is None:
            seen = Observed(looked.numbers, looked.weight, kind=looked.kind)
        else:
            seen = Observed(scores.prob, scores.count, paired=scores.count.dim() == 1)
        return (given, looked.known if logits is not None else None), seen

    def _width(self, more: More) -> int:
        """How many numbers the ranks add up."""
        tables = bool(more) and makes_tables(more)
        if tables:
            return 2 * self.num_modalities**2
        own = more.get("ratios") is not None or more.get("coefficients") is not None
        return self.num_modalities * 2 if own else self.num_modalities + 1

    def _decide(self, seen: Observed) -> tuple[Tensor, Tensor, Tensor]:
        """q_m, S_m and rho_m over all ranks."""
        if seen.paired or seen.kind != "scores":
            scores, ratios, q = stages(seen)
        else:
            scores, q = seen.means, None
            ratios = discrepancy_ratios(scores, backend=self.backend)
        if q is None:
            q = drop_probabilities(ratios, self.rule.q_base, self.rule.lam)
        else:
            q = q.nan_to_num(0.0)
        return q.to(self.q), scores, ratios

    def drop(self, given: Given, q: Tensor, scale: Tensor | None = None) -> OPMResult:
        """Drops with probability q, and multiplies what is left by `scale`; one launch."""
        out = self.drop_features(given.names, given.features, q, scale)
        if given.present is None:
            kept = dict(zip(given.names, out.features, strict=True))
            return OPMResult(kept, out.keep, q, None, None)
        return with_one_left(given, out.features, out.keep, q, scale)
