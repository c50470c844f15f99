"""LFM, learning the modality gap (NeurIPS 2024): njustkmg/NeurIPS24-LFM at ad44fa0.

Each modality has a head of its own, and the joint logits are their mean. The loss weighs the labels
against a divergence of both predictions from their mean. The weights come from a polynomial in the
epoch, or are moved before each epoch by a Hessian times a gradient, of which the mean over the
first tensor is used and the others are computed for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import Network

#: The first values of the learned weights: of the labels, and of the alignment.
INITIAL = (0.05, 0.95)


class Step(NamedTuple):
    """Results of a step."""

    logits: list[Tensor]
    losses: list[Tensor]


def schedule(epoch: int) -> tuple[float, float]:
    """The weights of an epoch, of 200."""
    first = (
        0.204623704
        + 3.35472727e-3 * epoch
        + 1.22989557e-4 * epoch**2
        - 2.92947416e-6 * epoch**3
        + 2.23835486e-8 * epoch**4
        - 5.39717505e-11 * epoch**5
    )
    return first, 1 - first


def alignment(audio: Tensor, visual: Tensor) -> Tensor:
    """Divergence of the mean prediction from both, each with a softmax and a logarithm anew."""
    p, q = torch.softmax(audio, dim=1), torch.softmax(visual, dim=1)
    mean = (p + q) / 2
    first = F.kl_div(torch.log_softmax(audio, dim=1), mean, reduction="batchmean")
    second = F.kl_div(torch.log_softmax(visual, dim=1), mean, reduction="batchmean")
    return (first + second) / 2


def forward(model: Network, audio: Tensor, visual: Tensor) -> list[Tensor]:
    """The joint logits and both modalities'."""
    a, v = model.features(audio, visual)
    own = [model.head_audio(a), model.head_visual(v)]
    return [(own[0] + own[1]) / 2, *own]


class Learned:
    """The weights that are learned.

    Args:
        rate: How far one unit of the Hessian's product moves them.
    """

    def __init__(self, rate: float = 1e-4) -> None:
        self.weights, self.rate = INITIAL, rate
        self.products: list[Tensor] = []
        self.step = 0.0

    def learn(
        self,
        model: Network,
        parameters: Sequence[Tensor],
        audio: Tensor,
        visual: Tensor,
        labels: Tensor,
        epoch: int,
    ) -> None:
        """Learns before an epoch, on the first half of samples that are held out."""
        if epoch and epoch % 20 == 0:
            self.rate /= 2
        half = len(labels) // 2
        logits = forward(model, audio[:half], visual[:half])
        label_loss = F.cross_entropy(logits[0], labels[:half])
        direction = torch.autograd.grad(label_loss, parameters, retain_graph=True)
        total = self.weights[0] * label_loss + self.weights[1] * alignment(*logits[1:])
        gradient = torch.autograd.grad(total, parameters, create_graph=True)
        self.products = list(
            torch.autograd.grad(gradient, parameters, grad_outputs=[d.detach() for d in direction])
        )
        self.step = self.products[0].mean().item()
        second = min(max(self.weights[1] - self.rate * self.step, 0.05), 0.95)
        self.weights = (1 - second, second)


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    epoch: int = 0,
    weights: tuple[float, float] | None = None,
) -> Step:
    """A training step.

    Args:
        model: The network, with a linear head for each modality.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        epoch: Counted from 0, of 200.
        weights: Those that were learned; None for the schedule's.
    """
    optimizer.zero_grad()
    first, second = schedule(epoch) if weights is None else weights
    logits = forward(model, audio, visual)
    label_loss, gap = F.cross_entropy(logits[0], labels), alignment(*logits[1:])
    loss = 2 * (first * label_loss + second * gap)
    loss.backward()
    optimizer.step()
    return Step(logits, [loss, label_loss, gap])
