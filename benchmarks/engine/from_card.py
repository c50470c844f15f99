"""Training steps of catalogue methods that have no file under `cases/`, made from their cards."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mmfuse
from mmfuse.ops._registry import OPS

from .case import CASES, register
from .networks import ThreeHeads
from .training import TrainingInputs
from .training_case import TrainingCase, own_heads_step
from .training_gate import backward, stepped


class CardStep(TrainingCase):
    """A step on the joint loss and both modalities' own, with whatever the card says it needs.

    The gate holds it against the reference backend's step: the method's own tests say that this is
    the paper's. `plain` is held against a plain pass.
    """

    network = ThreeHeads
    # A card does not say which ops its rule will call.
    ops = tuple(OPS)

    def exact(self, i: TrainingInputs, regulated: bool) -> list[Tensor]:
        if not regulated:
            return self._plain_step(i)
        now = [p.detach().clone() for p in i.parameters]
        i.restore()
        # An object of its own, whose first step it is as well.
        self._step(i, self._start(i, "reference"))
        found = [p.detach().double() for p in i.parameters]
        with torch.no_grad():
            torch._foreach_copy_(i.parameters, now)
        return found

    def _plain_step(self, i: TrainingInputs) -> list[Tensor]:
        def forward(model: ThreeHeads) -> tuple[list[Tensor], list[Tensor], Tensor]:
            a, v, out = model(i.audio, i.visual)
            logits = [out, model.head_audio(a), model.head_visual(v)]
            return [a, v], logits, sum(F.cross_entropy(z, i.labels) for z in logits)

        return stepped(i, [grad for _, grad in backward(i, forward).named_gradients()])

    def plain(self, i: TrainingInputs) -> None:
        own_heads_step(i)

    def mmfuse(self, i: TrainingInputs, backend: str) -> None:
        self._step(i, i.cached((self.method, backend), lambda: self._start(i, backend)))

    def _start(self, i: TrainingInputs, backend: str) -> Any:
        made = mmfuse.METHODS[self.method]
        options: dict[str, Any] = {"backend": backend}
        if made.card.acts == "gradient":
            if made(i.model.encoders).rule.need.stream:
                options["stream"] = i.stream
            method = made(i.model.encoders, **options)
            with i.at_start():
                method.set_epoch(0)
            return method
        if "stream" in inspect.signature(made).parameters:
            options["stream"] = i.stream
        method = made(**options).to(i.device)
        if hasattr(method, "update_prototypes"):
            _give_prototypes(i, method)
        return method

    def _step(self, i: TrainingInputs, method: Any) -> None:
        card = method.card
        i.optimizer.zero_grad()
        step = self._gradient_step if card.acts == "gradient" else self._feature_step
        step(i, method, card.needs)
        i.optimizer.step()

    def _gradient_step(self, i: TrainingInputs, method: Any, needs: tuple[str, ...]) -> None:
        a, v, out = i.model(i.audio, i.visual)
        logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
        losses = {name: F.cross_entropy(z, i.labels) for name, z in logits.items()}
        joint = F.cross_entropy(out, i.labels)
        if "unimodal_losses" in needs:
            method.backward(joint, unimodal_losses=losses)
            return
        given = {
            "logits": logits,
            "features": {"audio": a, "visual": v},
            "inputs": {"audio": i.audio, "visual": i.visual},
        }
        method.backward(
            joint + sum(losses.values()), labels=i.labels, **{name: given[name] for name in needs}
        )

    def _feature_step(self, i: TrainingInputs, method: Any, needs: tuple[str, ...]) -> None:
        a, v = i.model.features(i.audio, i.visual)
        features = {"audio": a, "visual": v}
        logits = {"audio": i.model.head_audio(a), "visual": i.model.head_visual(v)}
        given = {"features": features, "logits": logits, "labels": i.labels}
        taken = inspect.signature(method.forward).parameters
        seen = method(**{name: value for name, value in given.items() if name in taken})
        passed = getattr(seen, "features", features)
        out = i.model.fc(torch.cat(list(passed.values()), dim=1))
        own = getattr(seen, "logits", logits)  # of a method on logits, with other gradients
        losses = [F.cross_entropy(z, i.labels) for z in own.values()]
        if not getattr(method, "replaces_joint_loss", False):
            losses.append(F.cross_entropy(out, i.labels))
        sum([*losses, getattr(seen, "loss", 0)]).backward()


def _give_prototypes(i: TrainingInputs, method: Any) -> None:
    """One sample of each class, far from the others."""
    width = i.model.fc.in_features // 2
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, i.workload.classes, width, generator=generator).to(i.device, i.dtype)
    labels = torch.arange(i.workload.classes, device=i.device)
    method.update_prototypes([(dict(zip(("audio", "visual"), made, strict=True)), labels)])


def released_step(method: str) -> Callable[[Any, TrainingInputs], None] | None:
    """The released sequence, where it can be called without more than network and batch."""
    if importlib.util.find_spec(f"released.{method.lower()}") is None:
        return None
    step = getattr(importlib.import_module(f"released.{method.lower()}"), "step", None)
    required = 5  # network, optimizer, both inputs, labels
    if step is None:
        return None
    parameters = inspect.signature(step).parameters.values()
    if sum(p.default is p.empty for p in parameters) != required:
        return None

    def official(self: Any, i: TrainingInputs) -> None:
        step(i.model, i.optimizer, i.audio, i.visual, i.labels)

    return official


def add_missing_methods() -> None:
    """A case for each method of the catalogue that no registered one is a step of."""
    there = {case.method for case in CASES.values() if isinstance(case, TrainingCase)}
    for method, made in mmfuse.METHODS.items():
        # Some have no part in every step.
        if method in there or made.card.acts in ("head", "parameter"):
            continue
        own = {
            "name": f"{method.lower()}_training",
            "title": f"{method}: a whole training step",
            "method": method,
            "__doc__": f"Of {method}.",
        }
        official = released_step(method)
        if official is not None:
            own["official"] = official
        register(type(f"{method}Training", (CardStep,), own))
