"""A training step with each method of mmfuse, by what the catalogue says that it needs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

from .baselines import Build, Joint, Plan, heads, losses, total
from .data import Part
from .networks import WIDTH, Model


def has_own_losses(name: str) -> bool:
    """True if a method of the catalogue is for training on every modality's own loss as well."""
    card = mmfuse.METHODS[name].card
    return card.own_losses or "unimodal_losses" in card.needs or card.acts == "head"


def make(name: str, plan: Plan, *first: Any, **options: Any) -> Any:
    """The method of this name with the plan's options, and the epochs if it counts them."""
    made = mmfuse.METHODS[name]
    known = signature(made).parameters
    # Two methods in one step must not draw the same numbers; all that is drawn for gradients is the
    # same, so that OGM-GE and its control differ in the modulation alone.
    stream = "features" if made.card.acts == "feature" else None
    options |= {"backend": plan.backend, **plan.options}
    if "epochs" in known:
        options["epochs"] = plan.epochs
    if "stream" in known:
        options["stream"] = mmfuse.NoiseStream(plan.seed, name=stream)
    return made(*first, **options)


class OnGradients(Joint):
    """A method that acts on gradients, by the name of its class."""

    def __init__(self, model: Model, plan: Plan, *, name: str, **options: Any) -> None:
        super().__init__(model, plan)
        self.method = make(name, plan, dict(model.encoders), **options)
        need = self.method.rule.need
        if need.stream:
            self.method.stream = mmfuse.NoiseStream(plan.seed, plan.device)
        if need.anchors:
            self.coefficients = "factor of the displacement"
        self.two_gradients = need.second == "unimodal"
        if self.two_gradients:
            self.coefficients = "weight of the joint gradient"
        self.own_losses = has_own_losses(name)

    def set_epoch(self, epoch: int) -> None:
        """Copies the encoders, for methods that compare with them."""
        self.method.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the changed gradients in the model."""
        features = self.model.features(views)
        if self.own_losses:
            loss, own, logits = losses(self.model, features, labels)
            if self.two_gradients:
                return self.method.backward(loss, unimodal_losses=own).coefficients
            loss = loss + total(own)
        else:
            loss = F.cross_entropy(self.model.fuse(features), labels)
            logits = mmfuse.unimodal_logits(self.model.head, features)
        # Methods that need neither features nor inputs ignore them.
        return self.method.backward(loss, logits, labels, features, views).coefficients


class Guided(OnGradients):
    """CGGM: a classifier for each modality learns from the detached feature, with its own Adam.

    Gradients are clipped to the norm 0.8 after the modulation, as the authors do. The direction
    term is left out: it compares the classifiers' output layers with that of the joint head, which
    reads all features at once here and so has another shape.
    """

    def __init__(self, model: Model, plan: Plan, *, name: str) -> None:
        super().__init__(model, plan, name=name)
        # Not a part of the model: the plan's optimizer must not see them.
        self.classifiers = heads(model, list(model.encoders), plan)
        self.classifier_optimizer = torch.optim.Adam(self.classifiers.parameters(), lr=5e-4)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the changed gradients in the model, and trains the classifiers."""
        features = self.model.features(views)
        logits = {v: self.classifiers[v](feature.detach()) for v, feature in features.items()}
        loss = F.cross_entropy(self.model.fuse(features), labels)
        out = self.method.backward(loss, logits, labels)
        # The authors clip as well: a negative share climbs the loss, and would go on growing.
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.8)
        self.classifier_optimizer.zero_grad()
        total(mmfuse.unimodal_losses(logits, labels)).backward()
        self.classifier_optimizer.step()
        return out.coefficients


class InForward(Joint):
    """A method that is a module of the forward pass, by the name of its class.

    It is a part of the model, so that it hears the evaluation begin.
    """

    def __init__(self, model: Model, plan: Plan, *, name: str, **options: Any) -> None:
        super().__init__(model, plan)
        made = make(name, plan, num_modalities=len(model.encoders), **options)
        self.method = model.method = made.to(plan.device)
        self.own_losses = has_own_losses(name)

    def set_epoch(self, epoch: int) -> None:
        """Moves the method's window to this epoch."""
        self.method.set_epoch(epoch)


class Dropped(InForward):
    """OPM, alone or with a method on gradients."""

    coefficients = "share of features kept"

    def __init__(self, model: Model, plan: Plan, *, name: str, then: Build | None = None) -> None:
        super().__init__(model, plan, name=name)
        # The options are those of the first method.
        self.then = None if then is None else then(model, replace(plan, options={})).method

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model; both methods see the undropped features' logits."""
        features = self.model.features(views)
        logits = mmfuse.unimodal_logits(self.model.head, features)
        out = self.method(features, logits, labels)
        loss = F.cross_entropy(self.model.fuse(out.features), labels)
        if self.then is None:
            loss.backward()
        else:
            self.then.backward(loss, logits, labels)
        return 1 - out.drop_probability

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of all features."""
        return self.model.fuse(self.method(features).features)


class LeftOut(InForward):
    """Modality dropout, which looks at nothing but features."""

    coefficients = "share of features kept"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model."""
        out = self.method(self.model.features(views))
        F.cross_entropy(self.model.fuse(out.features), labels).backward()
        return out.keep.float().mean(1)


class Aligned(InForward):
    """LFM, whose joint logits are the mean of the modalities'."""

    coefficients = "weight of the alignment"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model."""
        shares = self.alone(self.model.features(views))
        # A modality's head are its columns of the joint one, of which their mean is the output.
        out = self.method({view: len(shares) * z for view, z in shares.items()}, labels)
        out.loss.backward()
        return out.coefficients[1].detach().expand(len(shares))


class Added(InForward):
    """A method that adds a loss of its own."""

    coefficients = "contributions to the prediction"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model."""
        features = self.model.features(views)
        joint, own, logits = losses(self.model, features, labels)
        out = self.method(features, logits, labels)
        (joint + (total(own) if self.own_losses else 0) + out.loss).backward()
        return out.contributions.detach()


class Larger(InForward):
    """ARL, with every modality's own loss beside the joint one."""

    coefficients = "factor of the feature's gradient"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model; all losses are those of the features passed on."""
        features = self.model.features(views)
        with torch.no_grad():
            seen = self.alone(features)
        out = self.method(features, seen, labels)
        logits = mmfuse.unimodal_logits(self.model.head, out.features)
        own = mmfuse.unimodal_losses(logits, labels, weights=self.method.loss_weight)
        (F.cross_entropy(self.model.fuse(out.features), labels) + total(own)).backward()
        return out.coefficients


class Shared(InForward):
    """AGM, on each modality's share of the joint logits."""

    coefficients = "factor of the share's gradient"

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model."""

        def joint(given: dict[str, Tensor]) -> Tensor:
            return self.model.fuse(self.model.features(given))

        out = self.method(mmfuse.shapley_responses(self.model, views, forward=joint), labels)
        F.cross_entropy(total(out.logits), labels).backward()
        return out.coefficients


class Reinforced(InForward):
    """ARM, with the paper's head: a fusion to the features' width, and one classifier for all."""

    coefficients = "factor of the feature"

    def __init__(self, model: Model, plan: Plan, *, name: str) -> None:
        super().__init__(model, plan, name=name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            fusion = nn.Linear(WIDTH * len(model.encoders), WIDTH)
            model.head = nn.Sequential(fusion, nn.Linear(WIDTH, model.classes)).to(plan.device)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients of the weighted features' loss in the model."""
        features = self.model.features(views)
        fusion, classifier = self.model.head
        with torch.no_grad():
            fused = fusion(torch.cat(list(features.values()), dim=1))
            out_of = (features, fused, self.alone(features), classifier(fused), labels)
        # The features with their graph; what the decision is made of needs none.
        out = self.method(features, *out_of[1:])
        F.cross_entropy(self.model.fuse(out.features), labels).backward()
        return out.weights.detach()

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of the features with the average weights of training."""
        return self.model.fuse(self.method(features).features)

    def alone(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the classifier that all features share."""
        return {view: self.model.head[1](feature) for view, feature in features.items()}


class Prototypical(InForward):
    """PMR, whose prototypes are class means of a tenth of the training samples, as in the paper."""

    coefficients = "weight of the loss to the prototypes"

    def __init__(self, model: Model, plan: Plan, *, name: str) -> None:
        super().__init__(model, plan, name=name, num_classes=model.classes)
        self.generator = torch.Generator().manual_seed(plan.seed)

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Gives the method its prototypes."""
        self.method.set_epoch(epoch)
        count = len(self.train.labels)
        order = torch.randperm(count, generator=self.generator)
        part = self.train.rows(order[: max(count // 10, 64)].to(self.train.labels.device))
        self.model.eval()
        self.method.update_prototypes([(self.model.features(part.views), part.labels)])
        self.model.train()

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients of both losses in the model."""
        features = self.model.features(views)
        out = self.method(features, labels)
        (F.cross_entropy(self.model.fuse(features), labels) + out.loss).backward()
        return out.coefficients


class Alternating(Joint):
    """MLA: one modality after the other trains its encoder, and the head that all share."""

    coefficients = "share of the head's gradient"

    def __init__(self, model: Model, plan: Plan, *, name: str) -> None:
        super().__init__(model, plan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            model.head = nn.Linear(WIDTH, model.classes).to(plan.device)
        self.method = model.method = make(
            name, plan, model.head, num_modalities=len(model.encoders)
        )

    def set_epoch(self, epoch: int) -> None:
        """Moves the method's window to this epoch."""
        self.method.set_epoch(epoch)

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Takes all turns; the last one leaves its gradients in the model."""
        kept = []
        for turn, (view, x) in enumerate(views.items()):
            if turn:
                self.optimizer.step()
                self.optimizer.zero_grad()
            feature = self.model.encoders[view](x)
            F.cross_entropy(self.model.head(feature), labels).backward()
            kept.append(self.method.step(feature).kept)
        return torch.stack(kept)

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Each modality's logits, by how sure they are."""
        return self.method.fuse(self.alone(features)).logits

    def alone(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of the head that all share."""
        return {view: self.model.head(feature) for view, feature in features.items()}


class Resetting(Joint):
    """ReLearning: a quarter of the training samples is held out, and is what tells the gap."""

    coefficients = "share of the way back to the start"

    def __init__(self, model: Model, plan: Plan, *, name: str) -> None:
        super().__init__(model, plan)
        every = max(1, plan.epochs // 4)
        self.method = make(name, plan, dict(model.encoders), every=every, num_classes=model.classes)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.weights = torch.zeros(len(model.encoders), device=plan.device)

    def trained_on(self, train: Part) -> Part:
        """Three quarters of the samples, drawn once by the seed; the others are held out."""
        count = len(train.labels)
        order = torch.randperm(count, generator=self.generator).to(train.labels.device)
        out = max(1, count // 4)
        self.held, self.kept = train.rows(order[:out]), train.rows(order[out:])
        return self.kept

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Resets the encoders, if the epoch before was one to end so."""
        if epoch and self.method.due(epoch - 1):
            parts: list[Any] = []
            for part in (self.kept, self.held):
                parts += [self.model.features(part.views), part.labels]
            out = self.method.weights(*parts, cluster=_means(self.model.classes))
            self.method.reset(out.coefficients)
            self.weights = out.coefficients.float()

    def __call__(self, views: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Leaves the gradients in the model."""
        super().__call__(views, labels)
        return self.weights


def _means(classes: int) -> Any:
    """Ten rounds of k-means from the first samples, so that the example needs no scikit-learn."""

    def cluster(x: Tensor) -> Tensor:
        centres = x[:classes]
        for _ in range(10):
            near = torch.cdist(x, centres).argmin(1)
            members = F.one_hot(near, len(centres)).to(x)
            centres = (members.T @ x) / members.sum(0).clamp(min=1).unsqueeze(1)
        return near

    return cluster


def build(name: str) -> Build:
    """How a method of the catalogue is trained, by what it needs."""
    made = mmfuse.METHODS[name]
    card = made.card
    if card.acts == "feature":
        if card.needs == ("features",):
            way: Any = LeftOut
        elif "fused" in card.needs:
            way = Reinforced
        else:
            way = Dropped if "stream" in signature(made).parameters else Larger
    elif card.acts == "loss":
        if hasattr(made, "update_prototypes"):
            way = Prototypical
        else:
            way = Aligned if getattr(made, "replaces_joint_loss", False) else Added
    elif hasattr(made, "direction_loss"):
        way = Guided
    else:
        way = {
            "gradient": OnGradients,
            "parameter": Resetting,
            "logits": Shared,
            "head": Alternating,
        }[card.acts]
    return partial(way, name=name)
