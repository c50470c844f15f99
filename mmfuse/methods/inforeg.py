"""InfoReg: regulating the acquisition of information in the prime learning window.

Huang, Wei, Yang & Hu, "Adaptive Unimodal Regulation for Balanced Multimodal Information
Acquisition", CVPR 2025.

Early in training a network takes in most of what it will ever know. InfoReg watches the trace of
each encoder's Fisher information, and while it still grows (the prime learning window) it holds
back the modalities that are ahead, so that the others can learn in that time too (Eq. 8-16):

    performance   s_m = mean over the batch of log p_i^m, p_i^m the true class's probability
    gap           Delta_m = mean of s_m - s_j over all j with s_j < s_m; 0 if there are none
    trace         T_m^t = mean over the steps of epoch t of |g_m|^2
    window        open if t >= 2 and (T_m^(t-1) - T_m^(t-2)) / T_m^(t-1) > K
    regulation    open and Delta_m > 0:  g <- g + alpha_m (w - w0),
                  alpha_m = exp(beta * tanh(Delta_m))

w0 are the parameters at the start of the epoch. The paper prints s_m (Eq. 8) with the opposite
sign, which contradicts the gap (Eq. 9-10); here a larger s_m is the better modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..loop.anchors import Anchors
from ..loop.modalities import Active, Encoder, Modalities, Select, given
from ..loop.ranks import Group, Observations
from ..loop.state import State
from ..ops import ModalityScores
from ..ops._tensors import index_tensor
from ._inforeg_regulation import regulate
from ._inforeg_rules import RELEASES, Official, Paper, Release, weights_of_layers


@dataclass(frozen=True)
class InfoRegResult:
    """What was decided in one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] alpha_m, in the order of `encoders`; 0 where nothing is regulated.
        scores: [M] batch mean of the true class's log-probability, in nats.
        information_gap: [M] Delta_m.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    information_gap: Tensor
    finite: Tensor


def information_gap(performance: Tensor) -> Tensor:
    """Delta_m: by how much m is ahead, on average, of the modalities behind it (Eq. 9-10).

    Args:
        performance: [M] s_m, larger is better.

    Returns:
        [M], 0 for the modality that is last, and where s_m is NaN.
    """
    ahead = performance.unsqueeze(1) - performance.unsqueeze(0)
    behind = ahead > 0
    return torch.where(behind, ahead, 0.0).sum(dim=1) / behind.sum(dim=1).clamp_(min=1)


class InfoReg:
    """InfoReg for a whole training run.

    ::

        inforeg = mmfuse.InfoReg({"audio": model.audio_net, "visual": model.visual_net})
        for epoch in range(epochs):
            inforeg.start_epoch()
            for batch, labels in loader:
                loss, logits = ...
                loss.backward()
                inforeg.step(logits, labels)
                optimizer.step()
            inforeg.end_epoch()

    `step` comes after AMP's unscaling and before clipping. It costs one read of the gradients, and
    while a window is open also one of parameters and anchors and one write. All state
    is on the encoders' device; the anchors are the only part of it that is as large as they are.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen.
        beta: Strength β of the regulation, at least 0.
        threshold: Growth K of the Fisher trace above which the prime learning window is open.
        select: Which parameters take part, as in `ogm_backward`.
        process_group: The ranks whose samples the scores are averaged over, as in `ogm_backward`.
        anchor_dtype: Of the epoch-start copies; ``torch.bfloat16`` halves them, at the cost of
            w₀'s rounding in every displacement.
        anchor_device: Where they are; "cpu" frees the GPU of them and copies them there in every
            step.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: as `ogm_backward`, or `anchor_dtype` is not a floating dtype.
        ValueError: as `ogm_backward`, or a hyper-parameter is out of range.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        beta: float = 0.9,
        threshold: float = 0.04,
        *,
        select: Select = "all",
        process_group: Group = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        self.modalities = Modalities(encoders, select)
        self.beta = beta
        self.threshold = threshold
        self.backend = backend
        self.anchors = Anchors(anchor_dtype, anchor_device)
        self._observations = Observations("InfoReg", process_group)
        self._rules: Paper | Official = Paper()
        self._running = False
        self._make_state()

    @classmethod
    def official(
        cls,
        encoders: Mapping[str, Encoder],
        *,
        release: Release = "november",
        process_group: Group = None,
        backend: str | None = None,
    ) -> InfoReg:
        """What the authors' released code runs, for two encoders in the order audio, visual.

        Its differences from the paper: s_m is the sum of the probabilities over the batch, which
        saturates tanh; alpha is 0.95·exp(tanh Δ) for the first and 0.1·exp(tanh Δ) for the second;
        there is one window, from the first modality's trace: open in the first epoch and then while
        (T^(t−1) − T^(t−11)) / ΣT^(t−10…t−1) > 0.05, over a history that begins with zeros; and T is
        the sum over the convolutional and linear weights of the mean over their elements of Σg²,
        with g as the pull has left it. The gradient is that of the sum of the joint and the two
        unimodal losses, which is yours to form: one backward pass of their sum.

        Args:
            encoders: As in `InfoReg`; audio first.
            release: Which of the two. "november" (2025-11-05, the authors' correction) is what is
                described here; its unimodal logits are the joint head's (`mmfuse.unimodal_logits`).
                "march" (2025-03-31, that of the paper) has unimodal heads of its own, a threshold
                of 0.04, and never pulls the second encoder.
            process_group: As in `InfoReg`.
            backend: As in `InfoReg`.

        Raises:
            TypeError: as `InfoReg`.
            ValueError: as `InfoReg`, or there are not two encoders, or no such release.
        """
        if release not in RELEASES:
            raise ValueError(f"release must be 'november' or 'march', got {release!r}")
        if isinstance(encoders, (Mapping, nn.ModuleDict)) and len(encoders) != 2:
            raise ValueError(f"the released code knows two modalities, got {list(encoders)}")
        threshold, multipliers = RELEASES[release]
        made = cls(
            encoders,
            beta=1.0,
            threshold=threshold,
            process_group=process_group,
            backend=backend,
        )
        made._rules = Official(weights_of_layers(encoders, made.modalities), multipliers)
        made._make_state()
        return made

    def _make_state(self) -> None:
        count = len(self.modalities.names)
        state = self._state = State("InfoReg", self.modalities.device)
        # Sum over the epoch's steps of |g|^2, one scalar for each tensor.
        state.add("squares", len(self.modalities.parameters))
        state.add("steps", dtype=torch.int64)
        # Traces of the last epochs, the latest in the last column.
        state.add("traces", count, self._rules.history)
        state.add("epochs", dtype=torch.int64)
        state.add("window_open", count, dtype=torch.bool)
        state.add("information_gap", count)

    def _follow(self) -> State:
        """The state, on the device where the encoders are now."""
        self._state.follow(self.modalities.device)
        return self._state

    @property
    def fisher_trace(self) -> Tensor:
        """[M] Fisher trace of the epoch so far, and of the last one between epochs; NaN before."""
        state = self._state
        return self._rules.trace(state["squares"], state["steps"], self.modalities)

    @property
    def window_open(self) -> Tensor:
        """[M] bool, whether this epoch lies in each modality's prime learning window."""
        return self._state["window_open"].clone()

    @property
    def information_gap(self) -> Tensor:
        """[M] Delta_m of the last step."""
        return self._state["information_gap"].clone()

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Copies the encoders and decides whether this epoch lies in the prime learning window.

        Raises:
            RuntimeError: the last epoch was not ended.
            ValueError: the encoders have other parameters than when this object was made.
        """
        if self._running:
            raise RuntimeError("InfoReg.start_epoch: call end_epoch() at the end of an epoch first")
        self.modalities.check_unchanged()
        self.anchors.take(self.modalities.parameters)
        state = self._follow()
        state["squares"].zero_()
        state["steps"].zero_()
        is_open = self._rules.window_open(state["traces"], state["epochs"], self.threshold)
        state["window_open"].copy_(is_open)
        self._running = True

    @torch.no_grad()
    def observe(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Takes in the scores of one micro-batch; `step` then uses all since the last step.

        Args:
            logits: Name → [B, C] logits of each modality alone.
            labels: [B] integer class indices; rows labelled −100 do not count.

        Raises:
            TypeError: logits or labels have an unsupported type.
            ValueError: names, shapes or labels do not fit.
        """
        scores = self.modalities.scores(logits, labels, self.backend)
        self._observations.add(torch.cat(scores), labels)

    @torch.no_grad()
    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> InfoRegResult:
        """Regulates the gradients that a backward pass has left, before the optimizer's step.

        A step with a NaN or an Inf in a gradient leaves the state as it was, since a GradScaler
        skips it.

        Args:
            logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`), of
                the last micro-batch; None if all were given to `observe`.
            labels: [B] integer class indices; rows labelled −100 do not count.
            grad_scale: 0-d factor by which the gradients are scaled still, where they cannot be
                unscaled before (see `mmfuse.amp.grad_scale`).
            found_inf: Not zero where a GradScaler will skip this step for another reason than the
                encoders' gradients, which are looked at here (see `mmfuse.amp.found_inf`).

        Returns:
            `InfoRegResult`.

        Raises:
            RuntimeError: `start_epoch` was not called, or nothing was observed.
            TypeError: a gradient, logits or labels have an unsupported type.
            ValueError: names, shapes or labels do not fit, or a parameter has changed its shape or
                device since `start_epoch`. Nothing has been changed then.
        """
        if not self._running:
            raise RuntimeError(
                "InfoReg.step: call start_epoch() first; it copies the parameters that gradients "
                "are compared with"
            )
        scores = None
        if logits is not None:
            scores = self.modalities.scores(logits, given(labels), self.backend)
        active = self.modalities.active()
        self.anchors.check(active, self.modalities.parameter_names)
        if scores is not None and labels is not None:
            self._observations.add(torch.cat(scores), labels)
        seen = self._observations.take()
        state = self._follow()

        prob, log_prob = seen.means.chunk(2)
        gap = information_gap(self._rules.performance(ModalityScores(prob, log_prob), seen))
        strength = self._rules.strength(self.beta * torch.tanh(gap))
        regulated = state["window_open"].to(gap.device) & (gap > 0)
        coefficients = torch.where(regulated, strength, 0.0)

        before = self._rules.trace_before_pull
        finite, squares = regulate(
            active, self.anchors, coefficients, before, grad_scale, self.backend
        )
        counts = torch.ones_like(finite)
        if found_inf is not None:
            counts = (found_inf == 0).all().to(finite.device)
        if active.grads:
            counts = self._add_to_trace(active, squares, counts)
        counts = counts.to(gap.device)
        state["information_gap"].copy_(torch.where(counts, gap, state["information_gap"]))
        return InfoRegResult(coefficients, log_prob, gap, finite)

    def _add_to_trace(self, active: Active, squares: Tensor, counts: Tensor) -> Tensor:
        """Adds |g|² to the epoch's trace; whether the step counts."""
        state = self._state
        squares = squares.to(state["squares"])
        counts = counts.to(squares.device) & squares.isfinite().all()
        squares = torch.where(counts, squares, 0.0)
        if len(active.ids) == len(self.modalities.parameters):
            state["squares"].add_(squares)
        else:
            index = index_tensor(tuple(active.ids), squares.device)
            state["squares"].index_add_(0, index, squares)
        state["steps"].add_(counts)
        return counts

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Writes the epoch's Fisher trace into the history. An epoch without steps leaves it alone.

        Raises:
            RuntimeError: `start_epoch` was not called.
        """
        if not self._running:
            raise RuntimeError("InfoReg.end_epoch: call start_epoch() at the start of an epoch")
        state = self._follow()
        counts = state["steps"] > 0
        later = torch.cat([state["traces"][:, 1:], self.fisher_trace.unsqueeze(1)], dim=1)
        state["traces"].copy_(torch.where(counts, later, state["traces"]))
        state["epochs"].add_(counts)
        self._running = False

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same numbers, also within an epoch.

        As with an optimizer the tensors are the object's own: save them, or copy them.
        """
        return {
            **self._state,
            "running": self._running,
            "anchors": self.anchors.state_dict(self.modalities),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: an entry is missing or does not fit; nothing has been changed then.
        """
        self._state.check(state_dict, ("running", "anchors"))
        self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
        self._follow().load(state_dict)
        self._running = bool(state_dict["running"])
        self._observations.clear()
