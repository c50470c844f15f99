"""RedReg: adaptive redundancy regulation.

Yang, Li, Chen, Wang, Xiong & Fan, "Adaptive Redundancy Regulation for Balanced Multimodal
Information Refinement", 2025. Paper's figure and released code; see `RedReg.official` for the
code's own quirks.

Late in training the dominant modality goes on moving its encoder without learning much from it.
RedReg looks for that phase. It then adds to the dominant encoder's gradient a part of the encoder's
displacement in this epoch: the part that is orthogonal to the gradient.

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
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..loop._parameters import Encoders
from ..loop.contract import Card, Common, Source
from ..loop.gradients import GradientMethod
from ..loop.ranks import agree
from ._redreg_equations import check_input_dropout, drop_probability, dropped
from ._redreg_monitor import Forward, Monitor, Noise
from ._redreg_rule import Projection, RedRegReleased, RedRegResult, RedRegRule

__all__ = ["RedReg", "RedRegResult"]


class RedReg(GradientMethod):
    """RedReg for a whole training run.

    ::

        redreg = mmfuse.RedReg(
            {"audio": model.audio_net, "visual": model.visual_net}, epochs=80
        )
        for epoch in range(80):
            redreg.set_epoch(epoch)
            for inputs, labels in loader:        # inputs = {"audio": ..., "visual": ...}
                features, logits, loss = ...
                loss.backward()
                redreg.step(logits, labels, features, inputs)
                optimizer.step()

    A step needs features, of one shape (flattened to [B, D] for the gate), and floating inputs. The
    monitor costs two forward passes of every encoder, without gradients. By the passes alone a step
    of training takes 5/3 of its time, and 1 + 2/(3k) with ``monitor_every=k``; docs/speed.md has
    what was measured. It runs in evaluation mode and leaves batch norm's statistics, training flags
    and PyTorch's random state as they were.

    A step whose scores are not finite does not enter the history, a redundancy that is not finite
    does not enter the moving average; neither regulates anything.

    Formulas: `mmfuse.methods.redreg`. Tested against them; `official()` against numbers that the
    authors' code computed.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
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
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`, or an encoder that is no module has no `forward`.
        ValueError: as `mmfuse.GradientMethod`, or a hyper-parameter is out of range.
    """

    card: ClassVar[Card] = Card(
        "Yang et al., 2025",
        "gradient",
        ("logits", "features", "inputs"),
        (Source("xia-zhe/RedReg at b620a46", golden=True),),
        golden=False,
    )
    rule: RedRegRule

    def __init__(
        self,
        encoders: Encoders,
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
        **common: Unpack[Common],
    ) -> None:
        check_input_dropout(input_dropout)
        self.input_dropout = input_dropout
        rule = RedRegRule(
            epochs=epochs,
            threshold=threshold,
            gamma=gamma,
            beta=beta,
            window=window,
            momentum=momentum,
            agreement=agreement,
            projection=projection,
            monitor_every=monitor_every,
        )
        super().__init__(rule, encoders, **common)
        monitor = Monitor(
            encoders, {} if forward is None else forward, sigma, clamp, noise, self.backend
        )
        self._adopt(replace(rule, monitor=monitor))

    @classmethod
    def official(cls, encoders: Encoders, **keywords: Any) -> RedReg:
        """The method as the authors' released code runs it.

        Its differences: the history of gains and the moving average begin anew in every epoch, and
        the average, from 0, is not bias-corrected, so that the first ratios of an epoch are 10,
        5.3, 3.7, …; image views are clamped to [0, 1], which after ImageNet's normalisation kills
        much of their noise; and one modality's whole input is dropped now and then (use
        `drop_inputs`). The gradient is that of the sum of the joint and the unimodal losses, which
        is yours to form: one backward pass of their sum.

        Tested against numbers that the authors' code computed (xia-zhe/RedReg at b620a46), at
        thresholds of 0.15 and 0.8. Three modalities and more, and ``projection="encoder"``, are
        from the formulas.

        Args:
            encoders: As in `RedReg`.
            **keywords: As in `RedReg`, but by default ``clamp`` is ("visual",), ``noise`` comes
                from ``torch.randn_like``, and ``input_dropout`` is (0.6, 0.1, 0.3).
        """
        released: dict[str, Any] = {
            "clamp": ("visual",),
            "noise": torch.randn_like,
            "input_dropout": (0.6, 0.1, 0.3),
        }
        made = cls(encoders, **{**released, **keywords})
        made._adopt(RedRegReleased(**vars(made.rule)))
        return made

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
        p = drop_probability(self.input_dropout, self.epoch, self.rule.epochs)
        if uniform is None:
            self._follow()
            agree(self.stream, self.process_group)
            uniform = self.stream.uniform(1, stream_id=2 * len(tensors)).squeeze(0)
        out = {}
        for m, (name, x) in enumerate(zip(self.modalities.names, tensors, strict=True)):
            here = dropped(uniform.to(x.device), p, m, len(tensors))
            out[name] = torch.where(here, 0.0, x)
        return out
