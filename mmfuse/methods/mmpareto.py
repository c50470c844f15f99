"""MMPareto: Pareto integration of the joint and the unimodal gradient.

Wei & Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024; the
formulas are those of the released code.

The network is trained on the joint loss and on every modality's own. An encoder m gets a gradient
g1 from the first and g2 from its own unimodal loss. If they agree, both count alike; if they
conflict, the encoder takes the direction of the shortest vector between them, which makes neither
loss worse. Each tensor's combined gradient then gets at least the length of the plain sum, times a
factor gamma:

    conflict     a_m = <g1, g2> over all of an encoder's tensors;  n1 = |g1|^2,  n2 = |g2|^2
    weights      k1 = k2 = 1/2                                     if a_m > 0
                 k1 = (n2 - a_m) / (n1 + n2 - 2 a_m), k2 = 1 - k1  else
    direction    h = 2 k1 g1 + 2 k2 g2
    length       g <- gamma h max(1, |g1 + g2| / |h|)              per tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .._devices import WIDE
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
from ..loop.ranks import Observed
from ..loop.result import Result

# Below this share of the terms that it is the sum of, |h|^2 is what rounding has left of them.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class MMParetoResult(Result):
    """The decision of one step; nothing here has waited for the device.

    Attributes:
        coefficients: [M] k1, the joint gradient's weight, in the order of `encoders`; 1/2 where the
            gradients agree, and for a modality that no sample has.
        cosines: [M] cosine of each encoder's two gradients; NaN if one is 0.
        finite: 0-d bool, False if a gradient holds a NaN or an Inf after the step.
    """

    coefficients: Tensor
    cosines: Tensor
    finite: Tensor


def min_norm_weight(n1: Tensor, a: Tensor, n2: Tensor) -> Tensor:
    """k1 of the shortest vector k1 g1 + (1 - k1) g2, as the released solver finds it.

    Args:
        n1: |g1|².
        a: <g1, g2>.
        n2: |g2|².

    Returns:
        Like `n1`; 0.999 where g1 is 0, 0.001 where g2 is.
    """
    inner = (n2 - a) / (n1 + n2 - 2 * a)
    return torch.where(a >= n1, 0.999, torch.where(a >= n2, 0.001, inner))


@dataclass(frozen=True)
class MMParetoRule(Stateless):
    """The equations above."""

    gamma: float = 1.5

    result = MMParetoResult
    need: ClassVar[Need] = Need(second="unimodal", stats=True, neutral=0.5)

    def __post_init__(self) -> None:
        if not (finite("gamma", self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma must be a positive finite number, got {self.gamma}")

    def idle(self) -> MMParetoRule:
        """Itself: without statistics, which the loop leaves out then, it adds both gradients."""
        return self

    def sense(self, batch: Batch) -> Sensed:
        """Senses nothing: the gradients say it all."""
        raise AssertionError("MMPareto senses no logits")

    def check_takes(self, kind: Kind) -> None:
        """Takes nothing but gradients."""
        raise TypeError(f"MMPareto takes no {kind}: its gradients decide")

    def decide(self, state: State, seen: Observed, tensors: Tensors, clock: Clock) -> Decision:
        """Weights of each modality, and the length of each tensor's gradient."""
        stats = tensors.stats
        here = seen.means > 0 if seen.means.numel() else None  # the modalities that a sample has
        if stats is None:  # outside of its epochs, or nothing has a gradient
            halves = torch.full((tensors.modalities,), 0.5, device=tensors.device)
            act = Act(pull=tensors.each(torch.ones_like(halves)))
            return Decision(act, (halves, torch.full_like(halves, torch.nan)))
        assert stats.dot is not None and stats.disp_sq is not None
        wide = WIDE[tensors.device.type]
        n1, a, n2 = stats.sq_norm.to(wide), stats.dot.to(wide), stats.disp_sq.to(wide)
        joint, between, unimodal = (tensors.sums(x) for x in (n1, a, n2))
        k1 = torch.where(between > 0, 0.5, min_norm_weight(joint, between, unimodal))
        first, second = tensors.each(2 * k1), tensors.each(2 - 2 * k1)
        plain = n1 + 2 * a + n2
        parts = first.square() * n1 + second.square() * n2
        combined = parts + 2 * first * second * a
        longer = self.longer(plain, combined, parts) * self.gamma
        scale, pull = (longer * first).to(stats.mean), (longer * second).to(stats.mean)
        cosines = between / (joint * unimodal).sqrt()
        if here is not None:  # of the others both gradients are added, whatever they are
            k1, cosines = torch.where(here, k1, 0.5), torch.where(here, cosines, torch.nan)
            each = tensors.each(here)
            scale, pull = (torch.where(each, x, 1.0) for x in (scale, pull))
        return Decision(Act(scale=scale, pull=pull), (k1, cosines))

    def longer(self, plain: Tensor, combined: Tensor, parts: Tensor) -> Tensor:
        """[T] max(1, |g1 + g2| / |h|), from squares; 1 where h is rounding noise.

        Args:
            plain: |g1 + g2|².
            combined: |h|².
            parts: The terms of |h|² that are not negative.
        """
        ratio = (plain / combined).sqrt()
        return torch.where(combined > _ROUNDING * parts, ratio.clamp(min=1.0), 1.0)


class MMParetoReleased(MMParetoRule):
    """The rule of the released code; `MMPareto.official` says how it differs."""

    def longer(self, plain: Tensor, combined: Tensor, parts: Tensor) -> Tensor:
        """[T] the ratio as it is, where it is above 1."""
        ratio = (plain / combined).sqrt()
        return torch.where(ratio > 1, ratio, 1.0)


class MMPareto(GradientMethod):
    """MMPareto for a whole training run.

    ::

        mmpareto = mmfuse.MMPareto({"audio": audio_net, "visual": visual_net})
        for batch, labels in loader:
            out, logits = ...                      # each modality has a head of its own
            losses = {name: F.cross_entropy(z, labels) for name, z in logits.items()}
            optimizer.zero_grad()
            mmpareto.backward(F.cross_entropy(out, labels), unimodal_losses=losses)
            optimizer.step()

    A step has two backward passes: of the joint loss, and of the sum of the unimodal ones, whose
    parts reach one encoder each. Heads keep the gradient of the sum of all losses. Without
    conflict an encoder's gradient is gamma times that of this sum. Gradients that are there
    already count as the joint loss's, so that a step has one micro-batch.

    `backward` takes ``present`` (see `mmfuse.GradientMethod`), which matters where the whole batch
    (of all ranks) lacks a modality: its encoder may be without gradients then, and existing ones
    are added as they are. Else masks change nothing, since the gradients decide.

    Formulas: `mmfuse.methods.mmpareto`. Tested against numbers that the authors' code computed.
    Three modalities and more are from the formulas.

    Args:
        encoders: Name → module, or iterable of parameters, for M ≥ 2 modalities.
        gamma: Factor on every encoder's combined gradient; the paper's is 1.5.
        **common: As in `mmfuse.GradientMethod`.

    Raises:
        TypeError: as `mmfuse.GradientMethod`.
        ValueError: as `mmfuse.GradientMethod`, or `gamma` is not positive.
    """

    card: ClassVar[Card] = Card(
        "Wei & Hu, ICML 2024",
        "gradient",
        ("unimodal_losses",),
        (Source("GeWu-Lab/MMPareto_ICML2024 at a339db3", golden=True),),
        golden=True,
    )
    rule: MMParetoRule

    def __init__(self, encoders: Encoders, *, gamma: float = 1.5, **common: Unpack[Common]) -> None:
        super().__init__(MMParetoRule(gamma), encoders, **common)

    @classmethod
    def official(
        cls, encoders: Encoders, *, gamma: float = 1.5, **common: Unpack[Common]
    ) -> MMPareto:
        """The method as the authors' released code runs it.

        The same but for a tensor in which both gradients cancel: there it divides by next to
        nothing, or by zero, which gives NaN.

        Tested against numbers that the authors' code computed (GeWu-Lab/MMPareto_ICML2024 at
        a339db3).
        """
        made = cls(encoders, gamma=gamma, **common)
        made._adopt(MMParetoReleased(gamma))
        return made
