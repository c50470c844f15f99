"""InfoReg's rules: what differs between the paper and the authors' two releases.

`mmfuse.methods.inforeg` has the paper and the equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..loop.modalities import Encoder, Modalities
from ..loop.ranks import Observed
from ..ops import ModalityScores

Release = Literal["november", "march"]

# Epochs that the released code averages over; their list of traces starts with as many zeros.
_OFFICIAL_WINDOW = 10


class Constants(NamedTuple):
    """What differs between the authors' releases."""

    threshold: float
    #: Of exp(tanh Δ), for the first and the second modality.
    multipliers: tuple[float, float]


RELEASES: dict[str, Constants] = {
    "november": Constants(0.05, (0.95, 0.1)),
    # Its second branch repeats the first one's condition, so that it is never reached.
    "march": Constants(0.04, (0.95, 0.0)),
}


class Paper:
    """The rules of the paper."""

    #: Epochs whose traces are kept.
    history = 2
    trace_before_pull = True

    def performance(self, scores: ModalityScores, seen: Observed) -> Tensor:
        """[M] s_m, the mean log-probability."""
        return scores.log_prob

    def strength(self, exponent: Tensor) -> Tensor:
        """[M] alpha_m = exp(beta * tanh(Delta_m)), of its exponent."""
        return torch.exp(exponent)

    def trace(self, squares: Tensor, steps: Tensor, modalities: Modalities) -> Tensor:
        """[M] T_m, the mean over the steps of |g_m|²; of sums of squares [T]."""
        return modalities.sums(squares) / steps

    def window_open(self, traces: Tensor, epochs: Tensor, threshold: float) -> Tensor:
        """[M] bool: T grows by more than the threshold, from the third epoch on."""
        before, last = traces.unbind(1)
        # A trace of zero gives NaN, which is above nothing.
        return ((last - before) / last > threshold) & (epochs >= 2)


class Official:
    """The rules of the released code, for two modalities.

    Args:
        weights: [T] one over the number of elements for the weights of convolutional and linear
            layers, 0 for all else.
        multipliers: Of exp(tanh Δ), for the first and the second modality.
    """

    history = _OFFICIAL_WINDOW + 1
    trace_before_pull = False

    def __init__(self, weights: Tensor, multipliers: tuple[float, float]) -> None:
        self.weights = weights
        self.multipliers = multipliers

    def performance(self, scores: ModalityScores, seen: Observed) -> Tensor:
        """[M] s_m, the sum of the probabilities."""
        return scores.prob * seen.count.to(scores.prob)

    def strength(self, exponent: Tensor) -> Tensor:
        """[M] alpha_m, with the release's multipliers."""
        first, second = torch.exp(exponent).unbind()
        return torch.stack([self.multipliers[0] * first, self.multipliers[1] * second])

    def trace(self, squares: Tensor, steps: Tensor, modalities: Modalities) -> Tensor:
        """[M] T_m of layers' weights; NaN before the first step."""
        self.weights = self.weights.to(squares.device)  # copies only after a move
        # A sum over the steps, where the paper has a mean.
        return torch.where(steps > 0, modalities.sums(squares * self.weights), torch.nan)

    def window_open(self, traces: Tensor, epochs: Tensor, threshold: float) -> Tensor:
        """[M] bool, of the first modality's trace for both."""
        first = traces[0]
        growth = (first[-1] - first[0]) / first[1:].sum()
        return ((growth > threshold) | (epochs == 0)).expand(len(traces))


def weights_of_layers(encoders: Mapping[str, Encoder], modalities: Modalities) -> Tensor:
    """[T] the weights of `Official`: of convolutional and linear layers 1/numel, 0 for all else."""
    layers = {
        id(module.weight)
        for encoder in encoders.values()
        if isinstance(encoder, nn.Module)
        for module in encoder.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    # Bare parameters do not say which layer they are from.
    bare = [not isinstance(encoder, nn.Module) for encoder in encoders.values()]
    counted = [
        id(p) in layers or (bare[m] and p.dim() in (2, 4))
        for p, m in zip(modalities.parameters, modalities.modality, strict=True)
    ]
    return torch.tensor(
        [c / max(1, p.numel()) for c, p in zip(counted, modalities.parameters, strict=True)],
        dtype=torch.float64,
        device=modalities.device,
    )
