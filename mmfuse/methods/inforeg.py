"""InfoReg: regulating the acquisition of information in the prime learning window.

Huang, Wei, Yang & Hu, "Adaptive Unimodal Regulation for Balanced Multimodal Information
Acquisition", CVPR 2025.

A network takes in most information early in training. InfoReg watches the trace of each encoder's
Fisher information. While that still grows (the prime learning window), it pulls encoders that are
ahead back towards the epoch's start, so that the others can learn in that time too (Eq. 8-16):

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
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
from ..loop.given import Kind
from ..loop.gradients import GradientMethod
from ..loop.pairs import missing, own
from ..loop.ranks import Observed
from ..loop.result import Result
from ..ops.information_pull import pull_of_checked

Release = Literal["november", "march"]


@dataclass(frozen=True)
class InfoRegResult(Result):
    """The decision of one step; nothing here has waited for the device.

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


@dataclass(frozen=True)
class InfoRegRule(Stateless):
    """The rule of the paper."""

    beta: float = 0.9
    threshold: float = 0.04
    #: [M] factors of alpha_m, which the released code has; none for 1.
    multipliers: tuple[float, ...] = ()

    result = InfoRegResult
    need: ClassVar[Need] = Need(second="anchor", squares="before", neutral=0.0)
    #: Epochs whose traces are kept.
    history: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (finite("beta", self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be a finite number of at least 0, got {self.beta}")
        if not finite("threshold", self.threshold):
            raise ValueError(f"threshold must be a finite number, got {self.threshold}")

    def init(self, modalities: int, tensors: int) -> dict[str, Tensor]:
        """The epoch's sums, the traces of the last epochs, and what was decided."""
        return {
            # Sum over the epoch's steps of |g|^2, one number for each tensor.
            "squares": torch.zeros(tensors, dtype=torch.float64),
            # Those in which some sample had the modality.
            "steps": torch.zeros(modalities, dtype=torch.int64),
            # The latest in the last column.
            "traces": torch.zeros(modalities, self.history, dtype=torch.float64),
            "epochs": torch.zeros((), dtype=torch.int64),
            "window_open": torch.zeros(modalities, dtype=torch.bool),
            "information_gap": torch.zeros(modalities, dtype=torch.float64),
        }

    def sense(self, batch: Batch) -> Sensed:
        """s_m."""
        return Sensed(batch.scores.log_prob)

    def check_takes(self, kind: Kind) -> None:
        """Takes coefficients."""
        if kind == "ratios":
            raise TypeError("InfoReg has no ratios; give scores, or coefficients alpha_m")

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """Delta_m and alpha_m: `mmfuse.reference.information_pull` has the formulas."""
        if seen.kind == "coefficients":
            alpha = seen.means.nan_to_num(0.0)
            gap = log_prob = torch.full_like(alpha, torch.nan)
            given = ~missing(seen)
            steps = state["steps"] + given.to(state["steps"].device)
            report = alpha, log_prob, gap
            return Decision(Act(pull=tensors.each(alpha)), report, {"steps": steps}, given)
        performance, count, log_prob = self.performance(seen)
        device = tensors.device
        pull = pull_of_checked(
            tensors.backend,
            performance.to(device).contiguous(),
            None if count is None else count.to(device).contiguous(),
            state["window_open"].to(device),
            state["steps"].to(device),
            tensors.owner,
            self.beta,
            self.multipliers,
        )
        return Decision(
            Act(pull.scale, pull.pull),
            (pull.coefficients, own(log_prob) if seen.paired else log_prob, pull.gap),
            {"information_gap": pull.gap, "steps": pull.steps},
            ~missing(seen) if seen.paired else None,
        )

    def settle(self, state: State, squares: Tensor, tensors: Tensors) -> State:
        """Adds |g|² to the epoch's sums."""
        return {"squares": tensors.added_to(state["squares"], squares)}

    def epoch(self, state: State, epoch: int, tensors: Tensors) -> State:
        """Ends an epoch that has had steps, and decides whether the next is in the window."""
        counts = state["steps"] > 0
        later = torch.cat([state["traces"][:, 1:], self.trace(state, tensors).unsqueeze(1)], dim=1)
        traces = torch.where(counts.unsqueeze(1), later, state["traces"])
        epochs = state["epochs"] + counts.any()
        return {
            "squares": torch.zeros_like(state["squares"]),
            "steps": torch.zeros_like(state["steps"]),
            "traces": traces,
            "epochs": epochs,
            "window_open": self.window_open(traces, epochs),
        }

    def performance(self, seen: Observed) -> tuple[Tensor, Tensor | None, Tensor]:
        """s_m and what it is multiplied by, [M] or tables [M, M], and the mean log-probability."""
        log_prob = seen.tables()[0] if seen.paired else seen.means
        return log_prob, None, log_prob

    def trace(self, state: State, tensors: Tensors) -> Tensor:
        """[M] T_m of the epoch so far; NaN before its first step."""
        return tensors.sums(state["squares"]) / state["steps"]

    def window_open(self, traces: Tensor, epochs: Tensor) -> Tensor:
        """[M] bool: T grows by more than the threshold, from the third epoch on."""
        before, last = traces.unbind(1)
        # From nothing to a modality's first trace is no growth, and 0 / 0 is above nothing.
        grown = ((last - before) / last > self.threshold) & (before > 0)
        return grown & (epochs >= 2)


class InfoReg(GradientMethod):
    """InfoReg for a whole training run.

    ::

        inforeg = mmfuse.InfoReg({"audio": model.audio_net, "visual": model.visual_net})
        for epoch in range(epochs):
            inforeg.set_epoch(epoch)
            for batch, labels in loader:
                loss, logits = ...
                loss.backward()
                inforeg.step(logits, labels)
                optimizer.step()

    A step costs one read of the gradients, and while a window is open also one of parameters and
    anchors and one write. All state is on the encoders' device; the anchors are the only part of it
    that is as large as they are.

    Formulas: `mmfuse.methods.inforeg`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        beta: Strength β of the regulation, at least 0.
        threshold: Growth K of the Fisher trace above which the prime learning window is open.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Huang et al., CVPR 2025",
        "gradient",
        ("logits",),
        (
            Source("GeWu-Lab/InfoReg_CVPR2025 at 939b2ed", golden=True, release="november"),
            Source("GeWu-Lab/InfoReg_CVPR2025 at b7524f8", golden=True, release="march"),
        ),
        golden=False,
    )
    rule: InfoRegRule

    def __init__(
        self,
        encoders: Encoders,
        *,
        beta: float = 0.9,
        threshold: float = 0.04,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(InfoRegRule(beta, threshold), encoders, **common)

    @classmethod
    def official(
        cls,
        encoders: Encoders,
        *,
        release: Release = "november",
        beta: float = 1.0,
        threshold: float | None = None,
        **common: Unpack[Common],
    ) -> InfoReg:
        """The method as the authors' released code runs it, for encoders audio, visual.

        Its differences from the paper: s_m is the sum of the probabilities over the batch, which
        saturates tanh; alpha is 0.95·exp(tanh Δ) for the first and 0.1·exp(tanh Δ) for the second;
        there is one window, from the first modality's trace: open in the first epoch and then while
        (T^(t−1) − T^(t−11)) / ΣT^(t−10…t−1) > 0.05, over a history that begins with zeros; and T is
        the sum over the convolutional and linear weights of the mean over their elements of Σg²,
        with g as the pull has left it. The gradient is that of the sum of the joint and the two
        unimodal losses, which is yours to form: one backward pass of their sum.
        Tested against numbers that the authors' code computed (GeWu-Lab/InfoReg_CVPR2025 at
        939b2ed), for "march" numbers that the authors' code computed (GeWu-Lab/InfoReg_CVPR2025 at
        b7524f8).

        Args:
            encoders: As in `InfoReg`; audio first.
            release: Which of the two. "november" (2025-11-05, the authors' correction) is what is
                described here; its unimodal logits are the joint head's (`mmfuse.unimodal_logits`).
                "march" (2025-03-31, that of the paper) has unimodal heads of its own, a threshold
                of 0.04, and never pulls the second encoder.
            beta: As in `InfoReg`; the released code has none.
            threshold: As in `InfoReg`; None for the release's.
            **common: As in `mmfuse.GradientMethod`.

        Raises:
            TypeError: as `InfoReg`.
            ValueError: as `InfoReg`, or there are not two encoders, or no such release.
        """
        from ._inforeg_released import RELEASES, InfoRegReleased, weights_of_layers

        if release not in RELEASES:
            raise ValueError(f"release must be 'november' or 'march', got {release!r}")
        if isinstance(encoders, (Mapping, nn.ModuleDict)) and len(encoders) != 2:
            raise ValueError(f"the released code knows two modalities, got {list(encoders)}")
        released, multipliers = RELEASES[release]
        threshold = released if threshold is None else threshold
        made = cls(encoders, beta=beta, threshold=threshold, **common)
        weights = weights_of_layers(encoders, made.modalities)
        made._adopt(InfoRegReleased(beta, threshold, multipliers, weights))
        return made

    @property
    def fisher_trace(self) -> Tensor:
        """[M] Fisher trace of the epoch so far; NaN before its first step."""
        return self.rule.trace(self._state, self._all_tensors())

    @property
    def window_open(self) -> Tensor:
        """[M] bool, whether this epoch lies in each modality's prime learning window."""
        return self._state["window_open"].clone()

    @property
    def information_gap(self) -> Tensor:
        """[M] Delta_m of the last step."""
        return self._state["information_gap"].clone()
