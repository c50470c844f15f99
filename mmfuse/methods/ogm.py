"""OGM and OGM-GE: on-the-fly gradient modulation with generalization enhancement.

Peng, Wei, Deng, Wang & Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
CVPR 2022; Wei, Hu, Du & Wen, "On-the-fly Modulation for Balanced Multimodal Learning", TPAMI 2024.

Every modality m gets a score S_m, how sure it alone is of the true classes, and a discrepancy ratio
rho_m, the mean of S_m / S_j over the other modalities. A modality that is ahead (rho_m > 1) has its
encoder's gradient scaled down by k_m; GE adds noise of the gradient's own standard deviation:

    TPAMI Eq. 11   k_m = max(0, 1 - alpha * tanh(rho_m - 1))     if rho_m > 1, else 1
    CVPR Eq. 10    k_m = 1 - tanh(alpha * rho_m)                 if rho_m > 1, else 1
    OGM            g <- k_m * g
    OGM-GE         g <- k_m * g + std(g) * N(0, 1),   per tensor, std taken before scaling
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..loop.epochs import EpochWindow
from ..loop.modalities import Active, Encoder, Modalities, Select, given
from ..loop.ranks import Group, Observations, agree, mean_over_ranks
from ..loop.updates import Decided, ScaledUpdates
from ..noise import NoiseStream
from ..ops import modulation_factors
from ..ops.modulation_factors import Formula, check_strength
from ._ogm_modulation import Noise, Rule, modulate

ApplyTo = Literal["gradient", "update"]

# A number to PyTorch's kernels, wherever the other operand is.
_ONE = torch.tensor(1.0)


@dataclass(frozen=True)
class OGMResult:
    """What was decided in one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] k_m, in the order of `encoders`.
        scores: [M] batch mean of the true class's probability.
        ratios: [M] discrepancy ratio rho_m.
        finite: 0-d bool, False if a modulated gradient holds a NaN or an Inf.
    """

    coefficients: Tensor
    scores: Tensor
    ratios: Tensor
    finite: Tensor


def ogm_coefficients(ratios: Tensor, alpha: float, formula: Formula = "tpami") -> Tensor:
    """k_m from rho_m: TPAMI Eq. 11 or CVPR Eq. 10; 1 where rho_m <= 1 or is NaN.

    Args:
        ratios: [M] discrepancy ratios.
        alpha: Strength, at least 0.
        formula: "tpami" is continuous at rho = 1; "cvpr" jumps there to 1 - tanh(alpha).

    Returns:
        [M], in [0, 1].
    """
    if formula == "tpami":
        # The maximum with 1 is the case rho <= 1, and fmax takes a NaN for the smaller number.
        k = torch.rsub(torch.fmax(ratios, _ONE).sub_(1.0).tanh_(), 1.0, alpha=alpha)
        return k.clamp_(min=0.0) if alpha > 1.0 else k
    return torch.where(ratios > 1.0, 1.0 - torch.tanh(alpha * ratios), 1.0)


def ogm_backward(
    loss: Tensor,
    encoders: Mapping[str, Encoder],
    logits: Mapping[str, Tensor],
    labels: Tensor,
    *,
    alpha: float = 0.8,
    noise: Noise = True,
    formula: Formula = "tpami",
    select: Select = "all",
    stream: NoiseStream | None = None,
    retain_graph: bool = False,
    process_group: Group = None,
    backend: str | None = None,
) -> OGMResult:
    """Takes the place of ``loss.backward()``: back-propagates, then modulates the gradients.

    OGM-GE by default, OGM with ``noise=False``; see `mmfuse.methods.ogm` for the formulas.
    Gradients end up in ``.grad``. The scale of the loss does not matter, so that the loss may come
    from a `GradScaler`; clip gradients afterwards.

    Equivalent to::

        loss.backward()
        for name, encoder in encoders.items():
            for p in encoder.parameters():
                p.grad = k[name] * p.grad + p.grad.std() * torch.randn_like(p.grad)

    Args:
        loss: The scalar loss of the fused prediction.
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`).
        labels: [B] integer class indices; rows labelled −100 do not count.
        alpha: Strength of the modulation, at least 0.
        noise: Whether to add noise (GE). A callable gets each gradient and returns standard normal
            noise of its shape, such as ``torch.randn_like``, and is used instead of the stream.
        formula: "tpami" or "cvpr".
        select: Which parameters: "all", "matrix" (ndim ≥ 2), "conv" (ndim = 4), or a callable on
            a parameter. The released code modulates "conv" only.
        stream: The random stream, advanced by one step; None for the default one, which
            `torch.manual_seed` controls.
        retain_graph: As for ``loss.backward``.
        process_group: The ranks whose samples the scores are averaged over; None for all ranks
            where torch.distributed is initialized, False for this rank alone.
        backend: Name of a backend; None for the best one.

    Returns:
        `OGMResult`.

    Raises:
        TypeError: a parameter, a gradient, logits or labels have an unsupported type.
        ValueError: the names differ, a modality has no parameter, a parameter is in two, a shape,
            a label or a hyper-parameter is wrong. Nothing has been changed then.
    """
    check_strength(alpha, formula)
    modalities = Modalities(encoders, select)
    scores = modalities.scores(logits, labels, backend).prob.detach()
    seen = mean_over_ranks(scores, labels, process_group)
    loss.backward(retain_graph=retain_graph)
    rule = Rule(alpha, formula, noise)
    active = modalities.active()
    decided, finite = modulate(active, seen, rule, stream, process_group, None, backend)
    return OGMResult(decided.coefficients, seen, decided.ratios, finite)


class OGM(EpochWindow):
    """OGM or OGM-GE for a whole training run.

    ::

        ogm = mmfuse.OGM({"audio": model.audio_net, "visual": model.visual_net}, ends=50)
        for epoch in range(epochs):
            ogm.set_epoch(epoch)
            for batch, labels in loader:
                loss, logits = ...
                out = ogm.backward(loss, logits, labels)   # or loss.backward(); ogm.step(...)
                optimizer.step()

    With gradient accumulation, `observe` every micro-batch and `step` once: the accumulated
    gradient is modulated with the scores of all of them. Under data parallelism (DDP, FSDP2) the
    scores are averaged over the ranks, by their numbers of samples, and the noise is the same
    everywhere.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen. Make this object after
            `fully_shard`, which replaces them.
        alpha: Strength; the papers use 0.8 for CREMA-D and 0.1 for VGGSound.
        noise: As in `ogm_backward`; False is OGM, True OGM-GE.
        formula: "tpami" (Eq. 11) or "cvpr" (Eq. 10).
        select: Which parameters take part, as in `ogm_backward`.
        starts: First epoch that is modulated.
        ends: Last epoch that is modulated; None for no end.
        apply_to: "gradient" (the papers), or "update" for adaptive optimizers, which divide a
            factor on the gradient out again: then the optimizer's update of the parameters is
            scaled, and gets noise of its own standard deviation. Pass every such optimizer to
            `attach`.
        process_group: As in `ogm_backward`.
        stream: The random stream; None makes one from `torch.initial_seed()`, at step 0. In a
            distributed run the first rank's is taken over by all.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: as `ogm_backward`.
        ValueError: as `ogm_backward`; or `ends` is before `starts`, or noise from a callable is to
            be added to updates.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        alpha: float = 0.8,
        noise: Noise = True,
        formula: Formula = "tpami",
        select: Select = "all",
        starts: int = 0,
        ends: int | None = None,
        apply_to: ApplyTo = "gradient",
        process_group: Group = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        check_strength(alpha, formula)
        if apply_to not in ("gradient", "update"):
            raise ValueError(f"apply_to must be 'gradient' or 'update', got {apply_to!r}")
        if apply_to == "update" and callable(noise):
            raise ValueError('noise from a callable is for gradients; use apply_to="gradient"')
        self._set_window(starts, ends)
        self.modalities = Modalities(encoders, select)
        self.alpha = alpha
        self.noise = noise
        self.formula: Formula = formula
        self.apply_to: ApplyTo = apply_to
        self.process_group = process_group
        self.backend = backend
        self.stream = stream or NoiseStream(device=self.modalities.device)
        self._observations = Observations("OGM", process_group)
        self._updates: list[ScaledUpdates] = []

    @classmethod
    def official(
        cls, encoders: Mapping[str, Encoder], *, alpha: float = 0.8, noise: Noise = True
    ) -> OGM:
        """What the authors' CVPR 2022 code runs on CREMA-D, to reproduce its tables.

        CVPR Eq. 10, four-dimensional weights only, epochs 0 to 50 inclusive. With
        ``noise=torch.randn_like`` the noise comes from PyTorch's generator, tensor by tensor, as it
        does there.
        """
        return cls(
            encoders, alpha=alpha, noise=noise, formula="cvpr", select="conv", starts=0, ends=50
        )

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales this optimizer's updates of the encoders; for ``apply_to="update"``.

        The optimizer's step then needs one more copy of the encoders' parameters.

        Raises:
            TypeError: it is no optimizer.
            ValueError: ``apply_to`` is "gradient", or the optimizer has no parameter of the
                encoders, or is attached already.
        """
        if self.apply_to != "update":
            raise ValueError('attach is for OGM(..., apply_to="update")')
        if any(known.optimizer is optimizer for known in self._updates):
            raise ValueError(f"this {type(optimizer).__name__} is attached already")
        self._updates.append(ScaledUpdates("OGM", self.modalities, optimizer, self.backend))

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves this optimizer's updates alone from now on, and frees the copy of the parameters.

        Raises:
            ValueError: it is not attached.
        """
        found = [known for known in self._updates if known.optimizer is optimizer]
        if not found:
            raise ValueError(f"this {type(optimizer).__name__} is not attached")
        found[0].remove()
        self._updates.remove(found[0])

    def observe(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Takes in the scores of one micro-batch; `step` then uses all since the last step.

        Args:
            logits: Name → [B, C] logits of each modality alone.
            labels: [B] integer class indices; rows labelled −100 do not count.

        Raises:
            TypeError: logits or labels have an unsupported type.
            ValueError: names, shapes or labels do not fit.
        """
        self._observations.add(self._scores(logits, labels), labels)

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        *,
        retain_graph: bool = False,
        found_inf: Tensor | None = None,
    ) -> OGMResult:
        """Takes the place of ``loss.backward()``; see `ogm_backward`."""
        self._check_attached()
        self.observe(logits, labels)
        scores = self._observations.take().means
        loss.backward(retain_graph=retain_graph)
        active = self.modalities.active() if self.apply_to == "gradient" else None
        return self._act(scores, found_inf, active)

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        found_inf: Tensor | None = None,
    ) -> OGMResult:
        """Modulates the gradients that a backward pass has left, before the optimizer's step.

        With ``apply_to="update"`` it only decides; the attached optimizers' next steps are scaled.

        Args:
            logits: Name → [B, C] logits of each modality alone, of the last micro-batch; None if
                all were given to `observe`.
            labels: [B] integer class indices; rows labelled −100 do not count.
            found_inf: Not zero where a GradScaler will skip this step for another reason than the
                encoders' gradients, which are looked at here (see `mmfuse.amp.found_inf`).

        Returns:
            `OGMResult`. A step with a NaN or an Inf in a gradient does not advance the stream.

        Raises:
            RuntimeError: nothing was observed, or ``apply_to="update"`` without `attach`.
            TypeError: a gradient, logits or labels have an unsupported type.
            ValueError: names, shapes or labels do not fit. Nothing has been changed then.
        """
        self._check_attached()
        scores = None if logits is None else self._scores(logits, given(labels))
        # Its errors come before anything has changed.
        active = self.modalities.active() if self.apply_to == "gradient" else None
        if scores is not None and labels is not None:
            self._observations.add(scores, labels)
        return self._act(self._observations.take().means, found_inf, active)

    @torch.no_grad()
    def _scores(self, logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.modalities.scores(logits, labels, self.backend).prob

    def _act(self, scores: Tensor, found_inf: Tensor | None, active: Active | None) -> OGMResult:
        device = self.modalities.device
        if self.stream.device != device:  # the encoders were moved after this object was made
            self.stream = self.stream.to(device)
        on = self.modulating
        rule = Rule(self.alpha if on else 0.0, self.formula, self.noise if on else False)
        group, backend = self.process_group, self.backend
        if active is not None:
            decided, finite = modulate(active, scores, rule, self.stream, group, found_inf, backend)
            return OGMResult(decided.coefficients, scores, decided.ratios, finite)
        decided = modulation_factors(scores, rule.alpha, rule.formula, backend=backend)
        if rule.noise:
            agree(self.stream, group)
        finite = torch.ones((), dtype=torch.bool, device=device)
        stream = self.stream if rule.noise else None
        state = None if stream is None else stream.state.clone()
        for update in self._updates:
            update.decided = Decided(decided.coefficients, stream, state, finite)
        return OGMResult(decided.coefficients, scores, decided.ratios, finite)

    def _check_attached(self) -> None:
        if self.apply_to == "update" and not self._updates:
            raise RuntimeError('OGM(apply_to="update"): pass the optimizer to attach() first')

    def state_dict(self) -> dict[str, Any]:
        """Epoch and noise stream: what a resumed run needs to go on with the same numbers."""
        return {"epoch": self.epoch, "stream": self.stream.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: an entry is missing.
        """
        missing = [key for key in ("epoch", "stream") if key not in state_dict]
        if missing:
            raise ValueError(f"the state of OGM lacks {missing}")
        epoch = int(state_dict["epoch"])
        self.stream.load_state_dict(state_dict["stream"])
        self.epoch = epoch
        self._observations.clear()
        for update in self._updates:
            update.decided = None
