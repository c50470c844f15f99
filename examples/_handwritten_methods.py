"""The network of the example, and its training step with each method.

A method is a class whose call is the forward and backward pass of one step; the ten lines that it
takes are what a user of mmfuse writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from _handwritten_data import CLASSES
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

HIDDEN, WIDTH = 128, 64


class Model(nn.Module):
    """One encoder per view, and a linear head on the concatenation of their features."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                view: nn.Sequential(
                    nn.Linear(d, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.ReLU()
                )
                for view, d in widths.items()
            }
        )
        self.head = nn.Linear(WIDTH * len(widths), CLASSES)

    def features(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """View → [B, WIDTH]."""
        return {view: self.encoders[view](x) for view, x in views.items()}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """[B, CLASSES] logits."""
        return self.head(torch.cat(list(features.values()), dim=1))


class Record(NamedTuple):
    """What a step did to each view; on the device, so that no step waits for it."""

    scores: Tensor  # [M]
    coefficients: Tensor  # [M]


class Joint:
    """Plain joint training, the baseline; a call is the forward and backward pass of one step."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace) -> None:
        self.model = model

    def set_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch."""

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record | None:
        """Leaves the gradients in the model."""
        F.cross_entropy(self.model.fuse(self.model.features(views)), labels).backward()
        return None

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """[B, CLASSES] logits of the trained model."""
        return self.model.fuse(features)


class Modulated(Joint):
    """OGM, or OGM-GE with `noise`."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, noise: bool) -> None:
        super().__init__(model, seed, args)
        stream = mmfuse.NoiseStream(seed, args.device)
        self.ogm = mmfuse.OGM(
            dict(model.encoders),
            alpha=args.alpha,
            noise=noise,
            stream=stream,
            backend=args.backend,
        )

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the modulated gradients in the model."""
        features = self.model.features(views)
        loss = F.cross_entropy(self.model.fuse(features), labels)
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.ogm.backward(loss, logits, labels)
        return Record(out.scores, out.coefficients)


class Regulated(Joint):
    """InfoReg."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace) -> None:
        super().__init__(model, seed, args)
        self.inforeg = mmfuse.InfoReg(dict(model.encoders), backend=args.backend)

    def set_epoch(self, epoch: int) -> None:
        """Copies the encoders."""
        self.inforeg.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the regulated gradients in the model."""
        features = self.model.features(views)
        F.cross_entropy(self.model.fuse(features), labels).backward()
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.inforeg.step(logits, labels)
        return Record(out.scores.exp(), out.coefficients)  # the geometric mean of probabilities


class RedundancyRegulated(Joint):
    """RedReg, whose monitor looks at the views as they come in."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace) -> None:
        super().__init__(model, seed, args)
        stream = mmfuse.NoiseStream(seed, args.device)
        self.redreg = mmfuse.RedReg(
            dict(model.encoders), epochs=args.epochs, stream=stream, backend=args.backend
        )

    def set_epoch(self, epoch: int) -> None:
        """Copies the encoders."""
        self.redreg.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the regulated gradients in the model."""
        features = self.model.features(views)
        F.cross_entropy(self.model.fuse(features), labels).backward()
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.redreg.step(logits, labels, features, views)
        return Record(out.scores, out.coefficients)


class Dropped(Joint):
    """OPM, or OPM + OGM-GE with `modulated`."""

    def __init__(
        self, model: Model, seed: int, args: argparse.Namespace, *, modulated: bool
    ) -> None:
        super().__init__(model, seed, args)
        self.opm = mmfuse.OPM(
            num_modalities=len(model.encoders),
            stream=mmfuse.NoiseStream(seed),
            backend=args.backend,
        ).to(args.device)
        self.ogm = Modulated(model, seed, args, noise=True).ogm if modulated else None

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model; both methods see the undropped features' logits."""
        features = self.model.features(views)
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.opm(features, logits, labels)
        loss = F.cross_entropy(self.model.fuse(out.features), labels)
        if self.ogm is None:
            loss.backward()
        else:
            self.ogm.backward(loss, logits, labels)
        return Record(out.scores, 1 - out.drop_probability)


class Reinforced(Joint):
    """ARM, with the paper's head: a fusion to the features' width, and one classifier for all."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace) -> None:
        super().__init__(model, seed, args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = nn.Linear(WIDTH * len(model.encoders), WIDTH)
            model.head = nn.Sequential(fusion, nn.Linear(WIDTH, CLASSES)).to(args.device)
        self.arm = mmfuse.ARM(num_modalities=len(model.encoders), backend=args.backend)
        self.arm.to(args.device)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients of the weighted features' loss in the model."""
        features = self.model.features(views)
        fusion, classifier = self.model.head
        with torch.no_grad():
            fused = fusion(torch.cat(list(features.values()), dim=1))
            logits = {view: classifier(feature) for view, feature in features.items()}
            fused_logits = classifier(fused)
        out = self.arm(features, fused, logits, fused_logits, labels)
        F.cross_entropy(self.model.fuse(out.features), labels).backward()
        return Record(out.scores.float(), out.weights.float())

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of the features with the average weights of training."""
        self.arm.eval()
        weighted = self.arm(features).features
        self.arm.train()
        return self.model.fuse(weighted)


# A method is one entry: called once per run to build it, then once per step.
METHODS: dict[str, Callable[[Model, int, argparse.Namespace], Joint]] = {
    "joint": Joint,
    "OGM": partial(Modulated, noise=False),
    "OGM-GE": partial(Modulated, noise=True),
    "InfoReg": Regulated,
    "RedReg": RedundancyRegulated,
    "OPM": partial(Dropped, modulated=False),
    "OPM + OGM-GE": partial(Dropped, modulated=True),
    "ARM": Reinforced,
}


# What a method's coefficients are, where they are not factors of the gradient.
COEFFICIENTS = {
    "InfoReg": "factor of the displacement",
    "RedReg": "factor of the displacement",
    "OPM": "share of features kept",
    "OPM + OGM-GE": "share of features kept",
    "ARM": "factor of the feature",
}
