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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._epochs import EpochWindow
from .modalities import Encoder, Modalities, Select, per_tensor
from .noise import NoiseStream, default_stream
from .ops import GradStats, discrepancy_ratios, grad_stats, update_grads_

Formula = Literal["tpami", "cvpr"]
Noise = bool | Callable[[Tensor], Tensor]

# The released code adds this to the standard deviation of the noise.
_STD_EPS = 1e-8

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
    backend: str | None = None,
) -> OGMResult:
    """Takes the place of ``loss.backward()``: back-propagates, then modulates the gradients.

    OGM-GE by default, OGM with ``noise=False``; see `mmfuse.ogm` for the formulas. Gradients
    end up in ``.grad``. The scale of the loss does not matter, so that the loss may come from a
    `GradScaler`; clip gradients afterwards.

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
        backend: Name of a backend; None for the best one.

    Returns:
        `OGMResult`.

    Raises:
        TypeError: a parameter, a gradient, logits or labels have an unsupported type.
        ValueError: the names differ, a modality has no parameter, a parameter is in two, a shape,
            a label or a hyper-parameter is wrong. Nothing has been changed then.
    """
    _check_hyperparameters(alpha, formula)
    modalities = Modalities(encoders, select)
    decision = _decide(modalities, logits, labels, alpha, formula, backend)
    loss.backward(retain_graph=retain_graph)
    return _act(modalities, decision, noise, stream, backend)


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

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen.
        alpha: Strength; the papers use 0.8 for CREMA-D and 0.1 for VGGSound.
        noise: As in `ogm_backward`; False is OGM, True OGM-GE.
        formula: "tpami" (Eq. 11) or "cvpr" (Eq. 10).
        select: Which parameters take part, as in `ogm_backward`.
        starts: First epoch that is modulated.
        ends: Last epoch that is modulated; None for no end.
        stream: The random stream; None makes one from `torch.initial_seed()`, at step 0.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: as `ogm_backward`.
        ValueError: as `ogm_backward`; or `ends` is before `starts`.
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
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        _check_hyperparameters(alpha, formula)
        self._set_window(starts, ends)
        self.modalities = Modalities(encoders, select)
        self.alpha = alpha
        self.noise = noise
        self.formula: Formula = formula
        self.backend = backend
        self.stream = stream or NoiseStream(device=self.modalities.parameters[0].device)

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

    def backward(
        self,
        loss: Tensor,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        *,
        retain_graph: bool = False,
    ) -> OGMResult:
        """Takes the place of ``loss.backward()``; see `ogm_backward`."""
        decision = self._decide(logits, labels)
        loss.backward(retain_graph=retain_graph)
        return self._act(decision)

    def step(self, logits: Mapping[str, Tensor], labels: Tensor) -> OGMResult:
        """Modulates the gradients that a backward pass has left, before the optimizer's step."""
        return self._act(self._decide(logits, labels))

    def _decide(self, logits: Mapping[str, Tensor], labels: Tensor) -> _Decision:
        decision = _decide(self.modalities, logits, labels, self.alpha, self.formula, self.backend)
        if not self.modulating:
            decision.coefficients.fill_(1.0)
        return decision

    def _act(self, decision: _Decision) -> OGMResult:
        device = self.modalities.parameters[0].device
        if self.stream.device != device:  # the encoders were moved after this object was made
            self.stream = self.stream.to(device)
        noise = self.noise if self.modulating else False
        return _act(self.modalities, decision, noise, self.stream, self.backend)

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
        self.stream.load_state_dict(state_dict["stream"])
        self.epoch = int(state_dict["epoch"])


@dataclass(frozen=True)
class _Decision:
    coefficients: Tensor
    scores: Tensor
    ratios: Tensor


def _check_hyperparameters(alpha: float, formula: str) -> None:
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    if formula not in ("tpami", "cvpr"):
        raise ValueError(f"formula must be 'tpami' or 'cvpr', got {formula!r}")


@torch.no_grad()
def _decide(
    modalities: Modalities,
    logits: Mapping[str, Tensor],
    labels: Tensor,
    alpha: float,
    formula: Formula,
    backend: str | None,
) -> _Decision:
    scores = modalities.scores(logits, labels, backend)
    ratios = discrepancy_ratios(scores.prob, backend=backend)
    return _Decision(ogm_coefficients(ratios, alpha, formula), scores.prob, ratios)


@torch.no_grad()
def _act(
    modalities: Modalities,
    decision: _Decision,
    noise: Noise,
    stream: NoiseStream | None,
    backend: str | None,
) -> OGMResult:
    active = modalities.active()
    device = active.grads[0].device if active.grads else decision.scores.device
    finite = torch.ones((), dtype=torch.bool, device=device)
    result = OGMResult(decision.coefficients, decision.scores, decision.ratios, finite)
    if not active.grads:
        return result
    scale = per_tensor(decision.coefficients.to(device), active)
    if not noise:
        update_grads_(active.grads, scale, finite=finite, backend=backend)
        return result
    noise_std = _noise_std(grad_stats(active.grads, backend=backend))
    if callable(noise):
        external = [noise(g) for g in active.grads]
        update_grads_(active.grads, scale, finite=finite, backend=backend)
        for grad, z, std in zip(active.grads, external, noise_std.unbind(), strict=True):
            grad.addcmul_(z, std.to(grad.device, grad.dtype))
        return result
    stream = default_stream(device) if stream is None else stream
    update_grads_(
        active.grads,
        scale,
        noise_std=noise_std,
        stream=stream.place(active.ids),
        finite=finite,
        backend=backend,
    )
    stream.advance()
    return result


def _noise_std(stats: GradStats) -> Tensor:
    """[T] std(g) + 1e-8; 0 for a one-element tensor, which has no standard deviation."""
    return torch.where(stats.numel > 1, stats.std + _STD_EPS, 0.0)
