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

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loop.anchors import Anchors
from ..loop.modalities import Encoder, Modalities, Select
from ..loop.ranks import Group, Observations
from ..loop.state import State
from ..noise import NoiseStream, saved_state
from . import _redreg_equations as equations
from ._redreg_monitor import Forward, Monitor, Noise
from ._redreg_regulation import Projection, regulate
from ._redreg_sensing import Sensing


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


class RedReg(Sensing):
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
        process_group: The ranks whose samples scores, redundancy and agreement are averaged over,
            as in `ogm_backward`.
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
        process_group: Group = None,
        anchor_dtype: torch.dtype | None = None,
        anchor_device: torch.device | str | None = None,
        stream: NoiseStream | None = None,
        backend: str | None = None,
    ) -> None:
        equations.check_hyperparameters(
            epochs, beta, window, momentum, projection, monitor_every, input_dropout
        )
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
        device = self.modalities.device
        self.stream = stream or NoiseStream(device=device)
        self.process_group = process_group
        self._observations = Observations("RedReg", process_group)
        self._rows = 0  # of this step's earlier micro-batches
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
        process_group: Group = None,
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
            process_group: As in `RedReg`.
            stream: As in `RedReg`; for `drop_inputs`, and for the views if `noise` is None.
            backend: As in `RedReg`.
        """
        made = cls(
            encoders,
            epochs=epochs,
            clamp=clamp,
            noise=noise,
            forward=forward,
            process_group=process_group,
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
        threshold = equations.gate_threshold(self.agreement, self.epoch, self.epochs)
        state["gate_threshold"].fill_(threshold)
        if self._resets:
            for key in ("scores", "steps", "average", "average_weight"):
                state[key].zero_()

    @torch.no_grad()
    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> RedRegResult:
        """Regulates the gradients that a backward pass has left, before the optimizer's step.

        A step whose scores are not finite does not enter the history, a redundancy that is not
        finite does not enter the moving average; neither regulates anything. A step with a NaN or
        an Inf in a gradient leaves the state as it was, since a GradScaler skips it.

        Args:
            logits: Name → [B, C] logits of each modality alone, of the last micro-batch; None, as
                the next three, if all were given to `observe`.
            labels: [B] integer class indices; rows labelled −100 do not count.
            features: Name → [B, …] features of one shape, flattened to [B, D] for the gate.
            inputs: Name → floating input of each encoder, of any shape.
            grad_scale: 0-d factor by which the gradients are scaled still, where they cannot be
                unscaled before (see `mmfuse.amp.grad_scale`).
            found_inf: Not zero where a GradScaler will skip this step for another reason than the
                encoders' gradients, which are looked at here (see `mmfuse.amp.found_inf`).

        Returns:
            `RedRegResult`.

        Raises:
            RuntimeError: `start_epoch` was not called, or nothing was observed.
            TypeError: a tensor has an unsupported type, or an encoder returns no tensor.
            ValueError: names, shapes or labels do not fit, or a parameter has changed its shape or
                device since `start_epoch`. Nothing has been changed then.
        """
        self._check_started()
        active = self.modalities.active()
        self.anchors.check(active, self.modalities.parameter_names)
        seen = None
        if logits is not None:
            if labels is None or features is None or inputs is None:
                raise TypeError("logits, labels, features and inputs go together: give all or none")
            seen = self._see(logits, labels, features, inputs)
        h, redundancy, gate = self._all_seen(seen, labels)

        new = equations.history(self._state, h, redundancy, self.momentum)
        growth = equations.growth(new["scores"], new["steps"])
        average = new["average"] / new["average_weight"] if self._corrects else new["average"]
        phase = equations.phase(new["redundancy"], average, growth, self.gamma)
        strength = equations.strength(h, phase, self.beta, self.threshold)
        coefficients = strength * gate.to(h)
        finite, counts = regulate(
            active, self.anchors, coefficients, self.projection, grad_scale, self.backend
        )
        if found_inf is not None:
            counts = counts & (found_inf == 0).all().to(counts.device)

        state = self._state
        counts = counts.to(self._state.device)
        for key, value in new.items():
            state[key].copy_(torch.where(counts, value, state[key]))
        self._steps += 1
        self.stream.advance(counts)
        redundancy = new["redundancy"].clone()
        return RedRegResult(coefficients, h, growth, redundancy, phase, gate, finite)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same numbers, also within an epoch.

        As with an optimizer the tensors are the object's own: save them, or copy them.
        """
        return {
            **self._state,
            "epoch": self.epoch,
            "step": self._steps,
            "stream": self.stream.state_dict(),
            "anchors": self.anchors.state_dict(self.modalities),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: an entry is missing or does not fit; nothing has been changed then.
        """
        others = ("epoch", "step", "stream", "anchors")
        self._state.check(state_dict, others)
        saved_state(state_dict["stream"])
        self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
        self._follow()
        self._state.load(state_dict)
        self.stream.load_state_dict(state_dict["stream"])
        self.epoch = int(state_dict["epoch"])
        self._steps = int(state_dict["step"])
        self._observations.clear()
        self._rows = 0
