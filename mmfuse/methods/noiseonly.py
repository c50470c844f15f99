"""Noise alone: the control that tells OGM-GE's noise from its modulation.

OGM-GE (Peng et al., CVPR 2022) scales the gradient of a modality that is ahead and adds noise of
the gradient's own standard deviation, which helps generalization by itself. This is OGM-GE with
every coefficient at 1:

    update  g <- g + std(g) * N(0, 1),   per tensor
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from ..loop._parameters import Encoders
from ..loop.contract import Card, Common
from ..loop.gradients import GradientMethod
from .ogm import Noise, OGMRule


class NoiseOnly(GradientMethod):
    """OGM-GE's noise without its modulation, a control for comparisons.

    It takes what `OGM` takes, and returns an `OGMResult` whose coefficients are 1, unless you give
    others.

    Formulas: `mmfuse.methods.noiseonly`. Tested against them.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        noise: As in `OGM`, but for False.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or there is no noise.
    """

    card: ClassVar[Card] = Card(
        "OGM-GE at k = 1 (Peng et al., CVPR 2022)", "gradient", ("logits",), (), golden=False
    )
    rule: OGMRule

    def __init__(
        self,
        encoders: Encoders,
        *,
        noise: Noise = True,
        **common: Unpack[Common],
    ) -> None:
        if noise is not True and not callable(noise):
            raise ValueError("noise must be True or a callable: without it nothing is left to do")
        super().__init__(OGMRule(alpha=0.0, noise=noise), encoders, **common)
