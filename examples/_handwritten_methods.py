"""The network of the example, and its training step with each method.

A method is a class whose call is the forward and backward pass of one step; the ten lines that it
takes are what a user of mmfuse writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

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
    """The effect of a step on each view; on the device, so that no step waits for it."""

    scores: Tensor  # [M]
    coefficients: Tensor  # [M]


class Joint:
    """Plain joint training, the baseline; a call is the forward and backward pass of one step.

    Attributes:
        coefficients: The meaning of the records' coefficients.
    """

    coefficients = "factor of the gradient"
    #: Of the model, set before the first step: for methods that take steps in between.
    optimizer: torch.optim.Optimizer

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


class AllLosses(Joint):
    """Training on the joint loss and on every view's own: the baseline of methods that do so."""

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record | None:
        """Leaves the gradients in the model."""
        joint, own, _ = losses(self.model, self.model.features(views), labels)
        (joint + sum(own.values())).backward()
        return None


def losses(
    model: Model, features: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The joint loss, each view's own, and the logits that those are of."""
    logits = mmfuse.unimodal_logits(model.head, features)
    own = mmfuse.unimodal_losses(logits, labels)
    return F.cross_entropy(model.fuse(features), labels), own, logits


class OnGradients(Joint):
    """A method that acts on gradients, by the name of its class."""

    def __init__(
        self, model: Model, seed: int, args: argparse.Namespace, *, name: str, **options: Any
    ) -> None:
        super().__init__(model, seed, args)
        made = mmfuse.METHODS[name]
        known = signature(made).parameters
        options |= {key: getattr(args, key) for key in ("alpha", "epochs") if key in known}
        self.method = made(dict(model.encoders), backend=args.backend, **options)
        need = self.method.rule.need
        if need.stream:
            self.method.stream = mmfuse.NoiseStream(seed, args.device)
        if need.anchors:
            self.coefficients = "factor of the displacement"
        self.two_gradients = need.second == "unimodal"
        if self.two_gradients:
            self.coefficients = "weight of the joint gradient"
        self.all_losses = name in ON_ALL_LOSSES

    def set_epoch(self, epoch: int) -> None:
        """Copies the encoders, for methods that compare with them."""
        self.method.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the changed gradients in the model."""
        features = self.model.features(views)
        if self.two_gradients:
            joint, own, logits = losses(self.model, features, labels)
            out = self.method.backward(joint, unimodal_losses=own)
            return Record(torch.exp(-torch.stack(list(own.values())).detach()), out.coefficients)
        if self.all_losses:
            joint, own, logits = losses(self.model, features, labels)
            loss = joint + sum(own.values())
        else:
            loss = F.cross_entropy(self.model.fuse(features), labels)
            logits = mmfuse.unimodal_logits(self.model.head, features)
        # Methods that need neither features nor inputs ignore them.
        out = self.method.backward(loss, logits, labels, features, views)
        # Its own scores may be logarithms, or shares of samples.
        scores = mmfuse.ops.modality_scores([z.detach() for z in logits.values()], labels).prob
        return Record(scores, out.coefficients)


class Dropped(Joint):
    """OPM, alone or with a method on gradients."""

    coefficients = "share of features kept"

    def __init__(
        self,
        model: Model,
        seed: int,
        args: argparse.Namespace,
        *,
        name: str,
        then: Callable[[Model, int, argparse.Namespace], OnGradients] | None = None,
    ) -> None:
        super().__init__(model, seed, args)
        # Part of the model, so that it hears the evaluation begin.
        model.dropping = mmfuse.METHODS[name](
            num_modalities=len(model.encoders),
            stream=mmfuse.NoiseStream(seed),
            backend=args.backend,
        ).to(args.device)
        self.then = None if then is None else then(model, seed, args).method

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model; both methods see the undropped features' logits."""
        features = self.model.features(views)
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.model.dropping(features, logits, labels)
        loss = F.cross_entropy(self.model.fuse(out.features), labels)
        if self.then is None:
            loss.backward()
        else:
            self.then.backward(loss, logits, labels)
        return Record(out.scores, 1 - out.drop_probability)

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of all features."""
        return self.model.fuse(self.model.dropping(features).features)


class LeftOut(Joint):
    """Modality dropout, which looks at nothing but features."""

    coefficients = "share of features kept"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        self.dropping = mmfuse.METHODS[name](
            num_modalities=len(model.encoders),
            stream=mmfuse.NoiseStream(seed),
            backend=args.backend,
        ).to(args.device)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model."""
        features = self.model.features(views)
        out = self.dropping(features)
        F.cross_entropy(self.model.fuse(out.features), labels).backward()
        with torch.no_grad():
            logits = mmfuse.unimodal_logits(self.model.head, features)
            scores = mmfuse.ops.modality_scores(list(logits.values()), labels).prob
        return Record(scores, out.keep.float().mean(1))


class Aligned(Joint):
    """LFM, whose joint logits are the mean of the views'."""

    coefficients = "weight of the alignment"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        made = mmfuse.METHODS[name]
        count = len(model.encoders)
        self.lfm = made(args.epochs, num_modalities=count, backend=args.backend).to(args.device)

    def set_epoch(self, epoch: int) -> None:
        """Moves the weights on."""
        self.lfm.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model."""
        shares = mmfuse.unimodal_logits(self.model.head, self.model.features(views))
        # A view's head are its columns of the joint one, of which their mean is the output.
        logits = {view: len(shares) * z for view, z in shares.items()}
        out = self.lfm(logits, labels)
        out.loss.backward()
        scores = mmfuse.ops.modality_scores([z.detach() for z in shares.values()], labels).prob
        return Record(scores, out.coefficients[1].expand(len(shares)))


class InForward(Joint):
    """A method that is a module of the forward pass, by the name of its class."""

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        made = mmfuse.METHODS[name]
        options = {"num_modalities": len(model.encoders), "backend": args.backend}
        if "stream" in signature(made).parameters:
            options["stream"] = mmfuse.NoiseStream(seed)
        self.method = made(**options).to(args.device)
        self.all_losses = name in ON_ALL_LOSSES

    def set_epoch(self, epoch: int) -> None:
        """By which the method's window goes."""
        self.method.set_epoch(epoch)


class Added(InForward):
    """A method that adds a loss of its own."""

    coefficients = "contributions to the prediction"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model."""
        features = self.model.features(views)
        joint, own, logits = losses(self.model, features, labels)
        out = self.method(features, logits, labels)
        (joint + (sum(own.values()) if self.all_losses else 0) + out.loss).backward()
        scores = torch.stack([torch.exp(-loss.detach()) for loss in own.values()])
        return Record(scores, out.contributions)


class Reinforced(Joint):
    """ARM, with the paper's head: a fusion to the features' width, and one classifier for all."""

    coefficients = "factor of the feature"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = nn.Linear(WIDTH * len(model.encoders), WIDTH)
            model.head = nn.Sequential(fusion, nn.Linear(WIDTH, CLASSES)).to(args.device)
        made = mmfuse.METHODS[name]
        weighting = made(num_modalities=len(model.encoders), backend=args.backend)
        model.weighting = weighting.to(args.device)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients of the weighted features' loss in the model."""
        features = self.model.features(views)
        fusion, classifier = self.model.head
        with torch.no_grad():
            fused = fusion(torch.cat(list(features.values()), dim=1))
            logits = {view: classifier(feature) for view, feature in features.items()}
            fused_logits = classifier(fused)
        out = self.model.weighting(features, fused, logits, fused_logits, labels)
        F.cross_entropy(self.model.fuse(out.features), labels).backward()
        return Record(out.scores.float(), out.weights.float())

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of the features with the average weights of training."""
        return self.model.fuse(self.model.weighting(features).features)


class Prototypical(Joint):
    """PMR, whose prototypes are class means of each epoch's first batch, as released for few."""

    coefficients = "weight of the loss to the prototypes"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        made = mmfuse.METHODS[name]
        pulling = made(
            num_classes=CLASSES, num_modalities=len(model.encoders), backend=args.backend
        )
        model.pulling = pulling.to(args.device)
        self.begins = True

    def set_epoch(self, epoch: int) -> None:
        """The next batch gives the prototypes."""
        self.model.pulling.set_epoch(epoch)
        self.begins = True

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients of both losses in the model."""
        features = self.model.features(views)
        if self.begins:
            self.model.pulling.update_prototypes([(features, labels)])
            self.begins = False
        out = self.model.pulling(features, labels)
        (F.cross_entropy(self.model.fuse(features), labels) + out.loss).backward()
        return Record(out.scores, out.coefficients)


class Shared(InForward):
    """AGM, on each view's share of the joint logits."""

    coefficients = "factor of the share's gradient"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model; the method's scores are losses."""

        def joint(given: dict[str, Tensor]) -> Tensor:
            return self.model.fuse(self.model.features(given))

        out = self.method(mmfuse.shapley_responses(self.model, views, forward=joint), labels)
        F.cross_entropy(sum(out.logits.values()), labels).backward()
        return Record(torch.exp(-out.scores), out.coefficients)


class Alternating(Joint):
    """MLA: one view after the other trains its encoder, and the head that all of them share."""

    coefficients = "share of the head's gradient"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.head = nn.Linear(WIDTH, CLASSES).to(args.device)
        made = mmfuse.METHODS[name]
        model.turns = made(model.head, num_modalities=len(model.encoders), backend=args.backend)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Takes all turns; the last one leaves its gradients in the model."""
        features, head = self.model.features(views), self.model.head
        scores, kept = [], []
        for turn, feature in enumerate(features.values()):
            if turn:
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss = F.cross_entropy(head(feature), labels)
            loss.backward()
            kept.append(self.model.turns.step(feature).kept)
            scores.append(torch.exp(-loss.detach()))
        return Record(torch.stack(scores), torch.stack(kept))

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Each view's logits, by how sure they are."""
        logits = {view: self.model.head(feature) for view, feature in features.items()}
        return self.model.turns.fuse(logits).logits


class Larger(InForward):
    """ARL, with every view's own loss beside the joint one."""

    coefficients = "factor of the feature's gradient"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model; all losses are those of the features passed on."""
        features = self.model.features(views)
        with torch.no_grad():
            seen = mmfuse.unimodal_logits(self.model.head, features)
        out = self.method(features, seen, labels)
        logits = mmfuse.unimodal_logits(self.model.head, out.features)
        own = mmfuse.unimodal_losses(logits, labels, weights=self.method.loss_weight)
        joint = F.cross_entropy(self.model.fuse(out.features), labels)
        (joint + sum(own.values())).backward()
        return Record(out.scores, out.coefficients)


class Resetting(Joint):
    """ReLearning: the last quarter of each batch is not trained on, and is what tells the gap."""

    coefficients = "share of the way back to the start"

    def __init__(self, model: Model, seed: int, args: argparse.Namespace, *, name: str) -> None:
        super().__init__(model, seed, args)
        every = max(1, args.epochs // 4)
        self.method = mmfuse.METHODS[name](
            dict(model.encoders), every=every, num_classes=CLASSES, backend=args.backend
        )
        self.batches: list[tuple[dict[str, Tensor], Tensor]] = []
        self.weights = torch.zeros(len(model.encoders), device=args.device)

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Resets the encoders, if the epoch before was one to end so."""
        if self.batches and epoch and self.method.due(epoch - 1):
            parts = []
            for which in (0, 1):
                cut = [[_quarter(x)[which] for x in (*v.values(), y)] for v, y in self.batches]
                *views, labels = (torch.cat(column) for column in zip(*cut, strict=True))
                names = self.model.encoders
                parts += [self.model.features(dict(zip(names, views, strict=True))), labels]
            out = self.method.weights(*parts, cluster=_few_means)
            self.method.reset(out.coefficients)
            self.weights = out.coefficients.float()
        self.batches = []

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Record:
        """Leaves the gradients in the model."""
        self.batches.append((views, labels))
        trained = {view: _quarter(x)[0] for view, x in views.items()}
        labels = _quarter(labels)[0]
        features = self.model.features(trained)
        F.cross_entropy(self.model.fuse(features), labels).backward()
        with torch.no_grad():
            logits = mmfuse.unimodal_logits(self.model.head, features)
            scores = mmfuse.ops.modality_scores(list(logits.values()), labels).prob
        return Record(scores, self.weights)


def _quarter(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first three quarters, and the last one."""
    return rows[: -(len(rows) // 4)], rows[-(len(rows) // 4) :]


def _few_means(x: Tensor) -> Tensor:
    """Ten rounds of k-means from the first samples, so that the example needs no scikit-learn."""
    centres = x[:CLASSES]
    for _ in range(10):
        near = torch.cdist(x, centres).argmin(1)
        members = F.one_hot(near, len(centres)).to(x)
        centres = (members.T @ x) / members.sum(0).clamp(min=1).unsqueeze(1)
    return near


Build = Callable[[Model, int, argparse.Namespace], Joint]


def build(name: str) -> Build:
    """How a method of the catalogue is trained, by what it needs."""
    card = mmfuse.METHODS[name].card
    if card.acts == "gradient":
        return partial(OnGradients, name=name)
    if card.acts == "parameter":
        return partial(Resetting, name=name)
    if hasattr(mmfuse.METHODS[name], "update_prototypes"):
        return partial(Prototypical, name=name)
    if card.acts == "loss":
        alone = getattr(mmfuse.METHODS[name], "replaces_joint_loss", False)
        return partial(Aligned if alone else Added, name=name)
    if card.acts == "logits":
        return partial(Shared, name=name)
    if card.acts == "head":
        return partial(Alternating, name=name)
    if card.needs == ("features",):
        return partial(LeftOut, name=name)
    if "fused" in card.needs:
        return partial(Reinforced, name=name)
    drops = "stream" in signature(mmfuse.METHODS[name]).parameters
    return partial(Dropped if drops else Larger, name=name)


#: Those that are trained on every modality's own loss as well.
ON_ALL_LOSSES = {
    name
    for name, made in mmfuse.METHODS.items()
    if made.card.own_losses or "unimodal_losses" in made.card.needs or made.card.acts == "head"
}

# The methods that are trained in several forms.
_ogm_ge = partial(OnGradients, name="OGM", noise=True)
FORMS: dict[str, dict[str, Build]] = {
    "OGM": {"OGM": partial(OnGradients, name="OGM", noise=False), "OGM-GE": _ogm_ge},
    "OPM": {"OPM": build("OPM"), "OPM + OGM-GE": partial(Dropped, name="OPM", then=_ogm_ge)},
}

# A method is one entry: called once per run to build it, then once per step.
METHODS: dict[str, Build] = {"joint": Joint}
for _name, _made in mmfuse.METHODS.items():
    if _made.card.acts == "head":
        continue  # steps of one modality after another are another loop
    METHODS |= FORMS.get(_name, {_name: build(_name)})
METHODS["all losses"] = AllLosses

#: Those that train on the joint loss alone, and so compare with "joint".
DEFAULT = [name for name in METHODS if name not in ("all losses", *ON_ALL_LOSSES)]
