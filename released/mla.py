"""MLA, alternating unimodal adaptation (CVPR 2024), in the first release and in the latest.

Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation at 4735bbc (2024-03-12), and at
ab6c184.

One forward pass of both encoders; then each modality in turn: its loss, the backward pass, the
projection of the head's gradient, the optimizer's step, and no gradients again. The visual feature
was so computed with the visual encoder before its turn, and goes through a head that has learned
from audio already. Three numbers are read on the host in the end. The projector is 512 × 512
there; here it is as wide as the head's input. The latest release looks for the head's weight under
a name that it has not, and projects nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network

#: Each release looks for the head's weight by this name.
WEIGHT = {"first": "weight", "head": "module.weight"}
#: The weight of the audio loss in a log.
SHARE = 0.55


class Step(NamedTuple):
    """Results of a step: both losses, and the projector after each turn."""

    losses: list[Tensor]
    projectors: list[Tensor]


class Projector:
    """The running projector.

    Args:
        head: The layer that all modalities share.
        release: "first" or "head".
    """

    def __init__(self, head: nn.Linear, release: str = "first") -> None:
        self.matrix = torch.eye(head.weight.shape[1]).to(head.weight)
        self.name = WEIGHT[release]
        self.turns = 0

    def before_update(self, head: nn.Linear, feature: Tensor, batch: int, batches: int) -> None:
        """Takes in a feature, and projects the gradient; in the very first turn nothing."""
        alpha = 0.1 ** (batch / batches + 1)
        if self.turns == 0:
            return
        for name, weight in head.named_parameters():
            if name != self.name:
                continue
            with torch.no_grad():
                r = torch.mean(feature, 0, True)
                k = torch.mm(self.matrix, torch.t(r))
                lost = torch.mm(k, torch.t(k)) / (alpha + torch.mm(k, r))
                self.matrix = torch.sub(self.matrix, lost)
                self.matrix = self.matrix / torch.norm(self.matrix, p="fro")
                weight.grad = torch.mm(weight.grad, torch.t(self.matrix))


def turn(
    model: Network,
    optimizer: torch.optim.Optimizer,
    projector: Projector,
    feature: Tensor,
    labels: Tensor,
    batch: int,
    batches: int,
) -> Tensor:
    """One modality's; its loss."""
    loss = F.cross_entropy(model.fc(feature), labels)
    loss.backward()
    projector.before_update(model.fc, feature, batch, batches)
    optimizer.step()
    optimizer.zero_grad()
    projector.turns += 1
    return loss


def step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    audio: Tensor,
    visual: Tensor,
    labels: Tensor,
    *,
    projector: Projector,
    batch: int,
    batches: int,
) -> Step:
    """A training step.

    Args:
        model: The network; its `fc` is the head, as wide as each of both features.
        optimizer: Of its parameters.
        audio: Input of the first encoder.
        visual: Input of the second one.
        labels: Class indices [B].
        projector: Of the whole run.
        batch: The batch's number in its epoch.
        batches: How many an epoch has.
    """
    optimizer.zero_grad()
    losses, projectors = [], []
    for feature in model.features(audio, visual):
        losses.append(turn(model, optimizer, projector, feature, labels, batch, batches))
        projectors.append(projector.matrix)
    for p in model.parameters():
        if p.grad is not None:
            p.grad = None
    a, v = losses
    (a * SHARE + v * (1 - SHARE)).item(), a.item(), v.item()
    return Step(losses, projectors)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of one sample's [C]; NaN where a probability is 0."""
    shares = F.softmax(logits, dim=0)
    return -torch.sum(shares * torch.log(shares))


def gates(logits: Sequence[Tensor]) -> list[Tensor]:
    """Each modality's weight in the prediction of one sample, compared on the host."""
    entropies = [entropy(z) for z in logits]
    largest = max(entropies)
    weights = [torch.exp(largest - h) for h in entropies]
    total = sum(weights)
    return [w / total for w in weights]
