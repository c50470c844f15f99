"""Training one model: the same engine for every method, baseline and data set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mmfuse

from .baselines import Build, Plan
from .data import Part, Split
from .networks import Model, encoder


class History(NamedTuple):
    """A training's course, epoch by epoch; everything but the coefficients is on validation data.

    The scores mean the same with every method: the probability that a modality alone gives to the
    true class, on average over the samples.
    """

    accuracy: Tensor  # [E]
    scores: Tensor  # [E, M]
    coefficients: Tensor  # [E, M], means over the steps; 1 where a method has none


def batches_of(
    part: Part, size: int, generator: torch.Generator
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """One epoch in random order; what is left over after the last whole batch is left out.

    A few samples more or less in the last batch would change how noisy a method's statistics are.
    """
    count = len(part.labels)
    order = torch.randperm(count, generator=generator).to(part.labels.device)
    whole = order[: max(1, count // size) * size]
    return [(x.views, x.labels) for x in map(part.rows, whole.split(size))]


class Run:
    """One model in training. The plan's seed alone fixes its weights, batches and noise."""

    def __init__(self, build: Build, split: Split, plan: Plan, classes: int) -> None:
        self.split, self.plan = split.to(plan.device), plan
        self.generator = torch.Generator().manual_seed(plan.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)  # the same weights for every method
            encoders = {view: encoder(tuple(x.shape[1:])) for view, x in split.train.views.items()}
            self.model = Model(encoders, classes)
        self.model.to(plan.device)
        self.method = build(self.model, plan)
        self.optimizer = torch.optim.SGD(
            self.method.groups(), lr=plan.lr, momentum=0.9, weight_decay=1e-4
        )
        self.method.optimizer, self.method.train = self.optimizer, self.split.train
        self.samples = self.method.trained_on(self.split.train)

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """One epoch in random order."""
        return batches_of(self.samples, self.plan.batch_size, self.generator)

    def step(self, views: dict[str, Tensor], labels: Tensor) -> Tensor | None:
        """One step of training; [M] coefficients where the method has them."""
        self.optimizer.zero_grad()
        done = self.method(views, labels)
        self.optimizer.step()
        return done

    def train(self, progress: Callable[[], object] = lambda: None) -> History:
        """Trains for the plan's epochs, and keeps the weights of the best one.

        The best epoch is the first with the highest accuracy on the validation samples.
        """
        rows: list[tuple[float, Tensor, Tensor]] = []
        best = -1.0
        for epoch in range(self.plan.epochs):
            self.method.set_epoch(epoch)
            steps = [self.step(*batch) for batch in self.batches()]
            accuracy, scores = self.validate()
            known = [coefficients.float() for coefficients in steps if coefficients is not None]
            mean = torch.stack(known).mean(0).cpu() if known else torch.ones_like(scores)
            rows.append((accuracy, scores, mean))
            if accuracy > best:
                best, self.best = accuracy, copy.deepcopy(self.model.state_dict())
            progress()
        accuracies, scores, coefficients = zip(*rows, strict=True)
        return History(torch.tensor(accuracies), torch.stack(scores), torch.stack(coefficients))

    def select(self) -> None:
        """Goes back to the weights of the best epoch."""
        self.model.load_state_dict(self.best)

    @torch.no_grad()
    def validate(self) -> tuple[float, Tensor]:
        """Accuracy on the validation samples, and the [M] scores there."""
        self.model.eval()
        part = self.split.validation
        features = self.model.features(part.views)
        logits = list(self.method.alone(features).values())
        scores = mmfuse.ops.modality_scores(logits, part.labels, backend=self.plan.backend)
        right = accuracy(self.method.predict(features), part.labels)
        self.model.train()
        return right, scores.prob.float().cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is that of their label."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
