"""RedReg: adaptive redundancy regulation.

Yang, Li, Chen, Wang, Xiong & Fan, "Adaptive Redundancy Regulation for Balanced Multimodal
Information Refinement", 2025. Paper's figure and released code; see `RedReg.official` for the
code's own quirks.

Late in training the dominant modality goes on moving its encoder without learning much from it.
RedReg looks for that phase and then takes from the dominant encoder's gradient what only drives it
further along the way it has gone in this epoch, as far as that way is not the gradient's own:

    gain        h_m = mean over the batch of p_i^m
    growth      s_m = (h_m(t) - h_m(t-W)) / |sum of the W gains before h_m(t)|;  1 until there are W
    redundancy  red_m = mean |E(x + n1) - E(x + n2)|^2 / mean |n1 - n2|^2
    phase       r_m = red_m / EMA(red_m) - gamma * max(s_m, 0)
    strength    beta_m = exp(beta * tanh(h_m - mean of the other h)) for the modality with the
                largest h, if r_m > R; 0 for the others, and for all on a tie
    gate        beta <- beta * [mean cosine of the modalities' features > a threshold that rises
                with the epochs]
    update      g <- g + beta (d - c g),  d = w - w0,  c = <d, g> / <g, g>

w0 are the parameters at the start of the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._monitor import Forward, Monitor, Noise
from ._state import State
from .anchors import Anchors
from .modalities import Active, Encoder, Modalities, Select, per_modality, per_tensor
from .noise import NoiseStream
from .ops import GradStats
from .ops._tensors import check_named
from .ops.co_information_gate import named_gate

Projection = Literal["tensor", "encoder"]

_EPS = 1e-12


@dataclass(frozen=True)
class RedRegResult:
    """What was seen and decided in one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] beta_m after the gate, in the order of `encoders`.
        scores: [M] h_m, batch mean of the true class's probability.
        growth: [M] s_m, the gain's growth rate.
        redundancy: [M] red_m, of this step or of the last one that was monitored.
        phase: [M] r_m; above `threshold` the modality is taken to be redundant.
        gate: 0-d, 0 or 1, whether the modalities agree.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    scores: Tensor
    growth: Tensor
    redundancy: Tensor
    phase: Tensor
    gate: Tensor
    finite: Tensor


class RedReg:
    """RedReg for a whole training run.

    ::

        redreg = mmfuse.RedReg(
            {"audio": model.audio_net, "visual": model.visual_net}, epochs=80
        )
        for epoch in range(80):
            redreg.start_epoch()
            for inputs, labels in loader:        # inputs = {"audio": ..., "visual": ...}
                features, logits, loss = ...
                loss.backward()
                redreg.step(logits, labels, features, inputs)
                optimizer.step()

    `step` comes after AMP's unscaling and before clipping. The monitor costs two forward passes of
    every encoder, without gradients. By the passes alone a step of training takes 5/3 of its time,
    and 1 + 2/(3k) with ``monitor_every=k``; measured on two ResNet-18, with the regulation, are
    1.52, 1.29 (k = 2) and 1.16 (k = 4). It runs in evaluation mode and leaves batch norm's
    statistics, training flags and PyTorch's random state as they were.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities. Parameters are
            collected once; freezing and unfreezing them later is seen.
        epochs: Length E of the training run, over which the gate's threshold rises.
        threshold: R, the phase r_m above which a dominant modality is regulated.
        gamma: γ, how much a growing gain counts against redundancy.
        beta: Strength β of the regulation, at least 0.
        window: W, the steps over which the gain's growth is taken, at least 1.
        momentum: Of the redundancy's moving average, in [0, 1).
        sigma: Standard deviation of the views' noise, in units of the inputs; a number, or one for
            each modality.
        agreement: The gate's threshold in the first and in the last epoch.
        projection: "tensor" takes c from each tensor, as the released code does, "encoder" from all
            tensors of an encoder together, as the abstract describes.
        monitor_every: Measure the redundancy in every k-th step only, and go on with the last one
            in between.
        forward: Name → callable from an input to its representation, for encoders that are not
            modules or take their input in another form; by default the encoder itself.
        clamp: Names of the modalities whose views are clamped to [0, 1].
        input_dropout: (p_first, p_last, share): `drop_inputs` drops one whole modality with a
            probability that goes from the first to the last over this share of the epochs. None
            for never.
        noise: A callable that gets an input and returns standard normal noise of its shape, such as
            ``torch.randn_like``; it is used instead of the stream.
        select: Which parameters take part, as in `ogm_backward`.
        anchor_dtype: Of the epoch-start copies, as in `InfoReg`.
        anchor_device: Where they are, as in `InfoReg`.
        stream: The random stream of the views; None makes one from `torch.initial_seed()`.
        backend: Name of a backend; None for the best one.

    Raises:
        TypeError: as `ogm_backward`, or an encoder that is no module has no `forward`.
        ValueError: as `ogm_backward`, or a hyper-parameter is out of range.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        *,
        epochs: int = 80,
        threshold: float = 0.15,
        gamma: float = 0.6,
        beta: float = 0.9,
        window: int = 10,
        momentum: float = 0.9,
        sigma: float | Mapping[str, float] = 0.03,
        agreement: tuple[float, float] = (0.2, 0.5),
        projection: Projection = "tensor",
        monitor_every: int = 1,
        forward: Mapping[str, Forward] | None = None,
        clamp: Collection[str] = (),
        input_dropout: tuple[float, float, float] | None = None,
        noise: Noise | None = None,
        select: Select = "all",
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        _check_hyperparameters(epochs, beta, window, momentum, projection, monitor_every)
        if input_dropout is not None and not all(0 <= p <= 1 for p in input_dropout):
            raise ValueError(f"input_dropout must hold numbers in [0, 1], got {input_dropout}")
        self.modalities = Modalities(encoders, select)
        self._monitor = Monitor(encoders, forward or {}, sigma, clamp, noise, backend)
        self.epochs = epochs
        self.threshold = threshold
        self.gamma = gamma
        self.beta = beta
        self.window = window
        self.momentum = momentum
        self.agreement = agreement
        self.projection: Projection = projection
        self.monitor_every = monitor_every
        self.input_dropout = input_dropout
        self.backend = backend
        self.anchors = Anchors(anchor_dtype, anchor_device)
        device = self.modalities.parameters[0].device
        self.stream = stream or NoiseStream(device=device)
        #: The epoch that runs, counted from 0; −1 before the first.
        self.epoch = -1
        self._resets = False
        self._corrects = True
        self._steps = 0
        count = len(self.modalities.names)
        state = self._state = State("RedReg", device)
        # h_m of the last W + 1 steps, the latest in the last column.
        state.add("scores", count, window + 1)
        state.add("steps", dtype=torch.int64)
        state.add("redundancy", count)
        state.add("average", count)
        state.add("average_weight", count)  # what the average's coefficients add up to
        state.add("gate_threshold")

    @classmethod
    def official(
        cls,
        encoders: Mapping[str, Encoder],
        *,
        epochs: int = 80,
        clamp: Collection[str] = ("visual",),
        noise: Noise | None = torch.randn_like,
        forward: Mapping[str, Forward] | None = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> RedReg:
        """What the authors' released code runs.

        Its differences: the history of gains and the moving average begin anew in every epoch, and
        the average, from 0, is not bias-corrected, so that the first ratios of an epoch are 10,
        5.3, 3.7, …; image views are clamped to [0, 1], which after ImageNet's normalisation kills
        much of their noise; and one modality's whole input is dropped now and then (use
        `drop_inputs`). The gradient is that of the sum of the joint and the unimodal losses, which
        is yours to form: one backward pass of their sum.

        Args:
            encoders: As in `RedReg`.
            epochs: As in `RedReg`.
            clamp: Names of the modalities whose inputs are images.
            noise: As in `RedReg`; by default PyTorch's generator, as there.
            forward: As in `RedReg`.
            stream: As in `RedReg`; for `drop_inputs`, and for the views if `noise` is None.
            backend: As in `RedReg`.
        """
        made = cls(
            encoders,
            epochs=epochs,
            clamp=clamp,
            noise=noise,
            forward=forward,
            stream=stream,
            input_dropout=(0.6, 0.1, 0.3),
            backend=backend,
        )
        made._resets, made._corrects = True, False
        return made

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Copies the encoders and sets the gate's threshold for the epoch.

        Raises:
            ValueError: the encoders have other parameters than when this object was made.
        """
        self.modalities.check_unchanged()
        self.anchors.take(self.modalities.parameters)
        self._follow()
        state = self._state
        self.epoch += 1
        first, last = self.agreement
        state["gate_threshold"].fill_(first + (last - first) * self._progress(self.epochs - 1))
        if self._resets:
            for key in ("scores", "steps", "average", "average_weight"):
                state[key].zero_()

    def _progress(self, length: float) -> float:
        """How much of the first `length` epochs is over, in [0, 1]."""
        return min(1.0, max(0, self.epoch) / max(1.0, length))

    def drop_inputs(
        self, inputs: Mapping[str, Tensor], uniform: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sets one modality's whole input to zero, or none; for the forward pass of training.

        Give the inputs as they were to `step`, whose monitor looks at those. Nothing is read on the
        host: which modality is dropped is decided on the device.

        Args:
            inputs: Name → tensor.
            uniform: 0-d number in [0, 1) that decides; None draws it from the stream.

        Returns:
            Name → tensor like the input.

        Raises:
            ValueError: names do not fit.
        """
        tensors = self.modalities.ordered("inputs", inputs)
        if self.input_dropout is None:
            return dict(zip(self.modalities.names, tensors, strict=True))
        first, last, share = self.input_dropout
        p = first + (last - first) * self._progress(int(self.epochs * share))
        if uniform is None:
            self._follow()
            uniform = self.stream.uniform(1, stream_id=2 * len(tensors)).squeeze(0)
        out = {}
        for m, (name, x) in enumerate(zip(self.modalities.names, tensors, strict=True)):
            u = uniform.to(x.device)
            low, high = p * m / len(tensors), p * (m + 1) / len(tensors)
            out[name] = torch.where((u >= low) & (u < high), 0.0, x)
        return out

    @torch.no_grad()
    def step(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> RedRegResult:
        """Regulates the gradients that a backward pass has left, before the optimizer's step.

        A step whose scores are not finite does not enter the history, a redundancy that is not
        finite does not enter the moving average; neither regulates anything.

        Args:
            logits: Name → [B, C] logits of each modality alone.
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features of one shape, flattened to [B, D] for the gate.
            inputs: Name → floating input of each encoder, of any shape.

        Returns:
            `RedRegResult`.

        Raises:
            RuntimeError: `start_epoch` was not called.
            TypeError: a tensor has an unsupported type, or an encoder returns no tensor.
            ValueError: names, shapes or labels do not fit, or a parameter has changed its shape or
                device since `start_epoch`. Nothing has been changed then.
        """
        if self.epoch < 0:
            raise RuntimeError(
                "RedReg.step: call start_epoch() first; it copies the parameters that gradients "
                "are compared with"
            )
        self._follow()
        names, state = self.modalities.names, self._state
        xs = self.modalities.ordered("inputs", inputs)
        check_named(xs, lambda m: f"inputs[{names[m]!r}]")
        h = self.modalities.scores(logits, labels, self.backend).prob
        gate = self._gate(features)
        active = self.modalities.active()
        self.anchors.check(active, self.modalities.parameter_names)

        redundancy = None
        if self._steps % self.monitor_every == 0:
            ratios = self._monitor(xs, self.stream)
            redundancy = torch.stack([ratio.to(state["average"]) for ratio in ratios])
        seen = self._history(h, redundancy)
        growth = self._growth(seen)
        phase = self._phase(seen, growth)
        coefficients = self._strength(h, phase) * gate.to(h)
        finite = self._act(active, coefficients)

        for key, value in seen.items():
            state[key].copy_(value)
        self._steps += 1
        self.stream.advance()
        redundancy = state["redundancy"].clone()
        return RedRegResult(coefficients, h, growth, redundancy, phase, gate, finite)

    def _gate(self, features: Mapping[str, Tensor]) -> Tensor:
        flat = [
            f.flatten(1) if isinstance(f, Tensor) and f.dim() > 2 else f
            for f in self.modalities.ordered("features", features)
        ]
        names = [f"features[{name!r}]" for name in self.modalities.names]
        return named_gate(names, flat, self._state["gate_threshold"], self.backend)

    def _history(self, h: Tensor, redundancy: Tensor | None) -> dict[str, Tensor]:
        """What of the state changes with this step, as new tensors."""
        old = self._state
        h = h.to(old["scores"])
        counts = h.isfinite().all()
        later = torch.cat([old["scores"][:, 1:], h.unsqueeze(1)], dim=1)
        new = {
            "scores": torch.where(counts, later, old["scores"]),
            "steps": old["steps"] + counts,
        }
        if redundancy is None:
            return {**new, **{key: old[key] for key in ("redundancy", "average", "average_weight")}}
        average = self.momentum * old["average"] + (1.0 - self.momentum) * redundancy
        weight = self.momentum * old["average_weight"] + (1.0 - self.momentum)
        usable = redundancy.isfinite()
        new["redundancy"] = redundancy
        new["average"] = torch.where(usable, average, old["average"])
        new["average_weight"] = torch.where(usable, weight, old["average_weight"])
        return new

    def _growth(self, seen: Mapping[str, Tensor]) -> Tensor:
        """s_m; 1 until the window is full."""
        scores = seen["scores"]
        rate = (scores[:, -1] - scores[:, 0]) / (
            scores[:, :-1].sum(dim=1).abs() + self.window * _EPS
        )
        return torch.where(seen["steps"] > self.window, rate, 1.0)

    def _phase(self, seen: Mapping[str, Tensor], growth: Tensor) -> Tensor:
        """r_m."""
        average = seen["average"]
        if self._corrects:
            average = average / seen["average_weight"]
        ratio = seen["redundancy"] / (average + _EPS)
        return ratio - self.gamma * growth.clamp(min=0.0)

    def _strength(self, h: Tensor, phase: Tensor) -> Tensor:
        """beta_m before the gate: of the one modality that is ahead of all others, if redundant."""
        count = len(h)
        others = ~torch.eye(count, dtype=torch.bool, device=h.device)
        ahead = (h.unsqueeze(1) - h.unsqueeze(0)).masked_fill(~others, 0.0)
        dominant = ((ahead > 0) | ~others).all(dim=1)
        delta = ahead.sum(dim=1) / (count - 1)
        regulated = dominant & (phase.to(h.device) > self.threshold)
        return torch.where(regulated, torch.exp(self.beta * torch.tanh(delta)), 0.0)

    def _act(self, active: Active, coefficients: Tensor) -> Tensor:
        device = active.grads[0].device if active.grads else coefficients.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        if not active.grads:
            return finite
        stats = self.anchors.stats(active, self.backend)
        share = self._share(stats, active)
        pull = per_tensor(coefficients.to(device), active).to(share)
        # 1 outright where nothing is pulled: there the share may be anything.
        scale = torch.where(pull == 0, 1.0, 1.0 - pull * share)
        self.anchors.update_(active, scale, pull, finite, self.backend)
        return finite

    def _share(self, stats: GradStats, active: Active) -> Tensor:
        """[T] c, the displacement's share along the gradient; 0 for a gradient of zero."""
        assert stats.dot is not None
        if self.projection == "tensor":
            return stats.dot / (stats.sq_norm + _EPS)
        count = len(self.modalities.names)
        dot, square = (per_modality(x, active.modality, count) for x in (stats.dot, stats.sq_norm))
        return per_tensor(dot / (square + _EPS), active)

    def _follow(self) -> None:
        """Moves state and stream to where the encoders are now."""
        device = self.modalities.parameters[0].device
        self._state.follow(device)
        if self.stream.device != device:
            self.stream = self.stream.to(device)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same numbers, also within an epoch.

        As with an optimizer the tensors are the object's own: save them, or copy them.
        """
        return {
            **self._state,
            "epoch": self.epoch,
            "step": self._steps,
            "stream": self.stream.state_dict(),
            "anchors": self.anchors.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: an entry is missing or does not fit; nothing has been changed then.
        """
        others = ("epoch", "step", "stream", "anchors")
        self._state.check(state_dict, others)
        self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
        self._follow()
        self._state.load(state_dict)
        self.stream.load_state_dict(state_dict["stream"])
        self.epoch = int(state_dict["epoch"])
        self._steps = int(state_dict["step"])


def _check_hyperparameters(
    epochs: int, beta: float, window: int, momentum: float, projection: str, monitor_every: int
) -> None:
    for name, value in (("epochs", epochs), ("window", window), ("monitor_every", monitor_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if projection not in ("tensor", "encoder"):
        raise ValueError(f"projection must be 'tensor' or 'encoder', got {projection!r}")
