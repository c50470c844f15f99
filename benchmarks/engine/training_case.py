"""The base of whole training steps, with their plain variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Case
from .gate import PLAIN
from .networks import AudioVisual
from .training import TrainingInputs
from .training_gate import check_parameters
from .workloads import Workload


class TrainingCase(Case):
    """A step of one of the catalogue's methods.

    Attributes:
        method: The catalogue's name of it.
        network: Makes the network.
        slack: How many times as far off as one gradient's an update may be.
    """

    kind = "training"
    autograd = True
    half = False
    method: str
    network: Callable[[int, int], AudioVisual] = AudioVisual
    slack: float = 1.0

    def make(
        self, workload: Workload, dtype: torch.dtype, device: torch.device, **options: Any
    ) -> TrainingInputs:
        """Network, optimizer and batch."""
        return TrainingInputs(workload, dtype, device, network=type(self).network)

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        """The parameters after a step of the method's released rules, or after a plain one."""
        raise NotImplementedError

    def check(self, provider: str, i: TrainingInputs, result: object) -> None:
        """Compares the parameters after a step with those of a plain one, regulated in float64."""
        regulated = provider != PLAIN
        exact = i.cached((self.name, regulated), lambda: self.exact(i, regulated))
        check_parameters(i, exact, self.slack)


def take_step(i: TrainingInputs, losses: Callable[[AudioVisual], Sequence[Tensor]]) -> None:
    """A plain step on the sum of the losses that the network's outputs give."""
    i.optimizer.zero_grad()
    sum(losses(i.model)).backward()
    i.optimizer.step()


def joint_step(i: TrainingInputs) -> None:
    """Trains on the joint loss."""

    def losses(model: AudioVisual) -> Sequence[Tensor]:
        _, _, out = model(i.audio, i.visual)
        return [F.cross_entropy(out, i.labels)]

    take_step(i, losses)


def own_heads_step(i: TrainingInputs) -> None:
    """Trains on the joint loss and on those of both modalities, from heads of their own."""

    def losses(model: AudioVisual) -> Sequence[Tensor]:
        a, v, out = model(i.audio, i.visual)
        logits = (out, model.head_audio(a), model.head_visual(v))
        return [F.cross_entropy(z, i.labels) for z in logits]

    take_step(i, losses)
