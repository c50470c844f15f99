"""InfoReg as its authors' two releases have it; `mmfuse.InfoReg.official` says how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._devices import WIDE
from ..loop._parameters import Encoders
from ..loop.contract import Batch, Need, Sensed, State, Tensors
from ..loop.modalities import Modalities
from ..loop.ranks import Observed
from .inforeg import InfoRegRule

# The threshold, and the multipliers of exp(tanh Δ) for the first and the second modality. March's
# second branch repeats the first one's condition, so that it is never reached.
RELEASES = {"november": (0.05, (0.95, 0.1)), "march": (0.04, (0.95, 0.0))}


@dataclass(frozen=True)
class InfoRegReleased(InfoRegRule):
    """The rule of the released code, for two modalities; `InfoReg.official` says how it differs."""

    multipliers: tuple[float, ...] = (0.95, 0.1)
    #: [T] one over the number of elements for weights of convolutional and linear layers, else 0.
    weights: Tensor | None = None

    need: ClassVar[Need] = InfoRegRule.need._replace(squares="after", means=2)
    # The list of ten traces that the released code averages over starts with as many zeros.
    history: ClassVar[int] = 11

    def sense(self, batch: Batch) -> Sensed:
        """Mean probabilities and mean log-probabilities."""
        return Sensed(torch.cat([batch.scores.prob, batch.scores.log_prob]))

    def performance(self, seen: Observed) -> tuple[Tensor, Tensor | None, Tensor]:
        """s_m, the sum of the probabilities: their mean, and the number of samples."""
        prob, log_prob = seen.tables() if seen.paired else seen.means.chunk(2)
        count = seen.count.to(WIDE[seen.count.device.type])
        return prob, count.view_as(prob) if seen.paired else count, log_prob

    def trace(self, state: State, tensors: Tensors) -> Tensor:
        """[M] T_m of layers' weights, a sum over the steps; NaN before the first."""
        assert self.weights is not None
        weighted = state["squares"] * self.weights.to(state["squares"].device)
        return torch.where(state["steps"] > 0, tensors.sums(weighted), torch.nan)

    def window_open(self, traces: Tensor, epochs: Tensor) -> Tensor:
        """[M] bool, of the first modality's trace for both."""
        first = traces[0]
        growth = (first[-1] - first[0]) / first[1:].sum()
        return ((growth > self.threshold) | (epochs == 0)).expand(len(traces))


def weights_of_layers(encoders: Encoders, known: Modalities) -> Tensor:
    """[T] the weights of the released trace."""
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
        for p, m in zip(known.parameters, known.modality, strict=True)
    ]
    return torch.tensor(
        [c / max(1, p.numel()) for c, p in zip(counted, known.parameters, strict=True)],
        dtype=WIDE[known.device.type],
        device=known.device,
    )
