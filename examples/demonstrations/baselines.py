"""Training without a method of mmfuse: what the methods are compared with.

A way to train is a class whose call is the forward and backward pass of one step; the few lines
that it takes are what a user writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

from .data import Part
from .networks import WIDTH, Model


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        lr: Learning rate of SGD with momentum 0.9 and weight decay 1e-4; constant.
        epochs: Passes over the training samples.
        batch_size: Samples in a step.
        options: Hyper-parameters of the method, by the names that it has for them.
        seed: Of weights, batches and noise.
        backend: Of mmfuse; None for the best one.
        device: The device to train on.
    """

    lr: float = 0.01
    epochs: int = 20
    batch_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    backend: str | None = None
    device: str = "cpu"


class Joint:
    """Plain joint training; a call is the forward and backward pass of one step.

    Attributes:
        coefficients: The meaning of what a call returns.
        optimizer: Of the model, set before the first step: for methods that take steps between.
        train: The training samples, set before the first step.
    """

    coefficients = "factor of the gradient"
    optimizer: torch.optim.Optimizer
    train: Part

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model, self.plan = model, plan

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        return [{"params": list(self.model.parameters())}]

    def trained_on(self, train: Part) -> Part:
        """The training samples that batches are drawn from; called before the first step."""
        return train

    def set_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch."""

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor | None:
        """Leaves the gradients in the model; returns [M] coefficients, on the device, or None."""
        F.cross_entropy(self.model.fuse(self.model.features(views)), labels).backward()
        return None

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """[B, classes] logits of the trained model."""
        return self.model.fuse(features)

    def alone(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modality → [B, classes], its logits without the others."""
        return mmfuse.unimodal_logits(self.model.head, features)


Build = Callable[[Model, Plan], Joint]


def losses(
    model: Model, features: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The joint loss, each modality's own, and the logits that those are of."""
    logits = mmfuse.unimodal_logits(model.head, features)
    own = mmfuse.unimodal_losses(logits, labels)
    return F.cross_entropy(model.fuse(features), labels), own, logits


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Their sum."""
    return sum(terms.values(), start=torch.zeros(()))


class UnimodalLosses(Joint):
    """The joint loss and every modality's own, of its share of the joint head."""

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> None:
        """Leaves the gradients in the model."""
        joint, own, _ = losses(self.model, self.model.features(views), labels)
        (joint + total(own)).backward()


def heads(model: Model, views: list[str], plan: Plan) -> nn.ModuleDict:
    """A linear head for each modality; the seed alone fixes the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        made = {view: nn.Linear(WIDTH, model.classes) for view in views}
    return nn.ModuleDict(made).to(plan.device)


class OwnHeads(Joint):
    """The joint loss and every modality's own, each of a head that nothing else trains."""

    def __init__(self, model: Model, plan: Plan) -> None:
        super().__init__(model, plan)
        self.heads = model.own_heads = heads(model, list(model.encoders), plan)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> None:
        """Leaves the gradients in the model."""
        features = self.model.features(views)
        own = mmfuse.unimodal_losses(self.alone(features), labels)
        (F.cross_entropy(self.model.fuse(features), labels) + total(own)).backward()

    def alone(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the heads."""
        return {view: self.heads[view](feature) for view, feature in features.items()}


class Separate(OwnHeads):
    """A model for each modality, or for `only` one; they predict by their mean probabilities.

    Nothing is shared, so that the sum of the losses trains each model as if it were by itself.
    """

    def __init__(self, model: Model, plan: Plan, *, only: str | None = None) -> None:
        Joint.__init__(self, model, plan)
        self.views = list(model.encoders) if only is None else [only]
        model.head = self.heads = heads(model, self.views, plan)

    def groups(self) -> list[dict[str, Any]]:
        """One for each modality, with its own learning rate where there is one."""
        rates = self.plan.options.get("rates", {})
        out = []
        for view in self.views:
            modules = (self.model.encoders[view], self.heads[view])
            params = [parameter for module in modules for parameter in module.parameters()]
            out.append({"params": params, "lr": rates.get(view, self.plan.lr)})
        return out

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> None:
        """Leaves the gradients in the model."""
        features = self.model.features({view: views[view] for view in self.views})
        total(mmfuse.unimodal_losses(super().alone(features), labels)).backward()

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logarithms of the mean probabilities."""
        logits = {view: self.heads[view](features[view]) for view in self.views}
        each = torch.stack([z.log_softmax(1) for z in logits.values()])
        return each.logsumexp(0)

    def alone(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the heads; equal ones for a modality that has no model."""
        given = {view: features[view] for view in self.views}
        logits = super().alone(given)
        blank = torch.zeros_like(logits[self.views[0]])
        return dict.fromkeys(features, blank) | logits
