"""CGGM, classifier-guided gradient modulation (NeurIPS 2024): zrguo/CGGM at 21e428c.

A classifier for each modality learns from its detached feature, with an optimizer of its own. How
much more of a batch than of the one before it gets right says how its encoder's gradients are
scaled: everything there is read on the host, counted by NumPy, and decided in Python's numbers. The
parameters are gone through once for each modality, by their names. Cosines are of copies of the
weights, so that a step's direction term, which the next step's loss gets, has these weights'
gradient; what of it reaches a classifier is cleared before the classifiers learn. There are always
three modalities; here also two.

Of the sentiment's score, scikit-learn's accuracy, only the number is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The sum of all progress is made larger by this.
EPS = 1e-8
#: λ, ρ and the largest norm of all gradients together.
DIRECTION, RHO, CLIP = 0.2, 1.3, 0.8


class Step(NamedTuple):
    """Results of a step, by modality where there are several."""

    loss: float
    classifier_loss: Tensor
    metrics: list[float]
    progress: list[float]
    coefficients: list[float]
    cosines: list[Tensor]
    direction_loss: Tensor
    norm: Tensor


def right_classes(logits: Tensor, labels: Tensor) -> float:
    """Share of samples, on the host."""
    found = np.argmax(logits.cpu().detach().numpy(), axis=1)
    return float(np.average(found == labels.view(-1).cpu().detach().numpy()))


def right_signs(prediction: Tensor, target: Tensor) -> float:
    """Share of samples whose two numbers are both positive, or both not."""
    found = prediction.view(-1).cpu().detach().numpy() > 0
    return float(np.average(found == (target.view(-1).cpu().detach().numpy() > 0)))


def decide(progress: Sequence[float]) -> list[float]:
    """The share of the progress that is not a modality's own; without any bound."""
    total = sum(progress) + EPS
    return [(total - mine) / total for mine in progress]


def cosine(weight: Tensor, fusion: Tensor) -> Tensor:
    """The cosine of a classifier's output layer and the fusion's."""
    return F.cosine_similarity(weight.clone().view(-1), fusion, dim=0)


def output_layer(classifier: nn.Module) -> Tensor:
    """The weight that ends it."""
    weight: Tensor = getattr(classifier, "out", classifier).weight
    return weight


class Training:
    """A training run.

    Args:
        model: Of inputs it makes a feature each, and the joint output.
        optimizer: Of its parameters.
        classifiers: Name → classifier, in the order of the inputs; an encoder's parameters are
            those whose layer has its name.
        classifier_optimizer: Of the classifiers; None if the other one has them.
        output: The fusion's last layer.
        regression: True if outputs are predictions [B, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        classifiers: dict[str, nn.Module],
        classifier_optimizer: torch.optim.Optimizer | None,
        output: nn.Linear,
        regression: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.classifiers = classifiers
        self.classifier_optimizer = classifier_optimizer
        self.output = output
        self.regression = regression
        own = {id(p) for c in classifiers.values() for p in c.parameters()}
        self.parameters = [p for p in model.parameters() if id(p) not in own]
        self.start()

    def start(self) -> None:
        """The state before the first step."""
        self.metrics: list[float] = [0.0] * len(self.classifiers)
        self.direction: Tensor | None = None

    def step(
        self,
        *inputs: Tensor,
        labels: Tensor,
        rho: float = RHO,
        direction: float = DIRECTION,
        clip: float = CLIP,
    ) -> Step:
        """A training step."""
        criterion = F.l1_loss if self.regression else F.cross_entropy
        metric = right_signs if self.regression else right_classes
        names = list(self.classifiers)
        self.optimizer.zero_grad()
        *features, out = self.model(*inputs)
        loss = criterion(out.squeeze(1) if self.regression else out, labels)
        if self.direction is not None:
            loss = loss + direction * self.direction
        loss.backward()

        for p in (p for c in self.classifiers.values() for p in c.parameters()):
            p.grad = None
        found = [self.classifiers[n](f.detach()) for n, f in zip(names, features, strict=True)]
        if self.regression:
            found = [z.squeeze(1) for z in found]
        classifier_loss = sum(criterion(z, labels) for z in found)
        classifier_loss.backward()
        self.raw()
        fusion = self.output.weight.clone().view(-1)
        cosines = [cosine(output_layer(self.classifiers[name]), fusion) for name in names]
        metrics = [metric(z, labels) for z in found]
        progress = [now - before for now, before in zip(metrics, self.metrics, strict=True)]
        k = decide(progress)
        self.metrics = metrics
        term = sum(np.abs(k)) - sum(a * b for a, b in zip(k, cosines, strict=True))
        self.direction = term / len(names)
        for factor, modality in zip(k, names, strict=True):
            for name, p in self.model.named_parameters():
                layer = name.split(".")[0]
                if modality in layer and "classifier" not in layer and "head" not in layer:
                    p.grad *= factor * rho
        self.modulated()
        if self.classifier_optimizer is not None:
            self.classifier_optimizer.step()
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        loss.item()  # read twice, for two sums
        return Step(
            loss.item(), classifier_loss, metrics, progress, k, cosines, self.direction, norm
        )

    def raw(self) -> None:
        """Called once all gradients are there, for tests that look at them."""

    def modulated(self) -> None:
        """Called once the encoders' are scaled, likewise."""
