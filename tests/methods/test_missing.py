"""Samples without modalities, with every method of the catalogue: nobody looks where nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import torch
from balancing import DROPPING, IN_FORWARD, KINDS, TWO_GRADIENTS, arguments, make, start
from states import differences
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import mmfuse
from mmfuse import METHODS, NoiseStream

ROWS, WIDTH, CLASSES = 18, 6, 3
Masks = dict[str, Tensor]


def masks_of(case: str, count: int, step: int) -> Masks:
    """30 % missing, such that every pair has samples in common."""
    generator = torch.Generator().manual_seed(10 + step)
    found = {f"m{m}": torch.rand(ROWS, generator=generator) > 0.3 for m in range(count)}
    if case == "a row without any":
        for mask in found.values():
            mask[[0, 5]] = False
    if case == "one is gone":
        found["m1"][:] = False
    return found


CASES = ("30 %", "a row without any", "one is gone")


class World:
    """Linear encoders, a head, a method, and steps in which it is shown what is missing."""

    def __init__(self, name: str, count: int) -> None:
        torch.manual_seed(count)
        self.name = name
        names = [f"m{m}" for m in range(count)]
        self.encoders = nn.ModuleDict({n: nn.Linear(4, WIDTH) for n in names})
        shared = name == "MLA"
        self.head = nn.Linear(WIDTH if shared else count * WIDTH, CLASSES)
        self.model = nn.ModuleDict({"encoders": self.encoders, "head": self.head}).double()
        self.method = self.made(count)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def made(self, count: int) -> Any:
        if self.name == "MLA":
            return mmfuse.MLA(self.head, num_modalities=count)
        if self.name == "ReLearning":
            return mmfuse.ReLearning(dict(self.encoders.items()))
        options: dict[str, Any] = {}
        if self.name in IN_FORWARD and count != 2:
            options["num_modalities"] = count
        if self.name == "LearningRates":
            options["rates"] = [0.5] * count
        return make(self.name, dict(self.encoders.items()), stream=NoiseStream(3), **options)

    def step(self, step: int, masks: Masks | None, garbage: float = math.nan) -> list[Tensor]:
        """One training step; what was decided, and the gradients that were left."""
        generator = torch.Generator().manual_seed(step)
        labels = torch.arange(ROWS) % CLASSES
        inputs = {}
        for m, name in enumerate(self.encoders):
            x = torch.randn(ROWS, 4, generator=generator).double()
            x[:, 0] += 2 * labels / (m + 1)
            inputs[name] = x
        self.optimizer.zero_grad()
        features = {n: net(inputs[n]) for n, net in self.encoders.items()}
        real = shown_of(features, masks, 0.0)
        named = {"features": features, "inputs": inputs}
        given = {name: shown_of(values, masks, garbage) for name, values in named.items()}
        drive: Callable[..., list[Any]] = {"MLA": self.in_turns, "ReLearning": self.between}.get(
            self.name, self.balanced
        )
        out = drive(real, given, labels, masks, lambda values: shown_of(values, masks, garbage))
        grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        if self.name != "MLA":  # which has stepped
            self.optimizer.step()
        found = [x.detach() for x in tree_leaves(out) if isinstance(x, Tensor)]
        return [*found, *grads]

    def balanced(
        self, real: Any, given: Any, labels: Tensor, masks: Masks | None, spoil: Any
    ) -> list[Any]:
        start(self.method)
        fused = torch.stack(list(real.values())).sum(0)
        logits = mmfuse.unimodal_logits(self.head, real)
        seen = {
            **given,
            "logits": spoil(logits),
            "labels": labels,
            "fused": fused,
            "fused_logits": self.head(torch.cat([fused] * len(real), 1)),
        }
        if masks is not None:
            seen |= {"way": "present", "present": masks}
        out, passed, more = None, real, torch.zeros((), dtype=torch.float64)
        if self.name in IN_FORWARD:
            out = self.method(**arguments(self.method, seen))
            passed = getattr(out, "features", real)
            passed = shown_of(passed, masks, 0.0)  # the user's own loss does not look there either
            more = getattr(out, "loss", more)
        joint = self.head(torch.cat(list(passed.values()), 1))
        if hasattr(out, "logits"):
            joint = sum(shown_of(out.logits, masks, 0.0).values())
        loss = F.cross_entropy(joint, labels)
        loss = more if getattr(self.method, "replaces_joint_loss", False) else loss + more
        if self.name in TWO_GRADIENTS:
            own = mmfuse.unimodal_losses(logits, labels, present=masks)
            told = {} if masks is None else {"present": masks}
            return fields_of(self.method.backward(loss, unimodal_losses=own, **told))
        loss.backward()
        if self.name not in IN_FORWARD:
            out = self.method.step(**arguments(self.method, seen))
        return fields_of(out)

    def in_turns(
        self, real: Any, given: Any, labels: Tensor, masks: Masks | None, spoil: Any
    ) -> list[Any]:
        found: list[Any] = []
        for name, feature in real.items():
            self.optimizer.zero_grad()
            here = torch.ones(ROWS, dtype=torch.bool) if masks is None else masks[name]
            z = self.head(feature)
            F.cross_entropy(z, torch.where(here, labels, -100), reduction="sum").backward()
            told = {} if masks is None else {"present": here}
            found += [*fields_of(self.method.step(given["features"][name], **told))]
            found.append(self.head.weight.grad.clone())
            self.optimizer.step()
            with torch.no_grad():
                real = {n: self.encoders[n](torch.zeros(ROWS, 4).double()) for n in real} | real
        logits = spoil({name: self.head(feature) for name, feature in real.items()})
        told = {} if masks is None else {"present": masks}
        return [*found, *self.method.fuse(logits, **told)]

    def between(
        self, real: Any, given: Any, labels: Tensor, masks: Masks | None, spoil: Any
    ) -> list[Any]:
        F.cross_entropy(self.head(torch.cat(list(real.values()), 1)), labels).backward()
        values = {n: x.detach() for n, x in given["features"].items()}
        told = {} if masks is None else {"train_present": masks, "val_present": masks}
        val = {n: 2 - x[:, :1].expand(-1, WIDTH) for n, x in values.items()}
        out = self.method.weights(values, labels, val, labels, **told, cluster=nearest)
        self.method.reset(out.coefficients)
        return fields_of(out)


def shown_of(values: dict[str, Tensor], masks: Masks | None, filler: float) -> dict[str, Tensor]:
    """The values, with the filler where they are missing."""
    if masks is None:
        return values
    return {n: torch.where(masks[n].unsqueeze(1), x, filler) for n, x in values.items()}


def nearest(x: Tensor) -> Tensor:
    """Stands in for k-means, and gives the same everywhere."""
    return ((x.mean(1) + 1) * 1.5).long().clamp(0, 2)


def fields_of(out: Any) -> list[Any]:
    """The numbers of a result; where a feature is missing it may be anything."""
    names = [f.name for f in fields(out) if f.name not in ("features", "logits", "joint")]
    return [getattr(out, name) for name in names]


def state_of(world: World) -> dict[str, Any]:
    return {"model": dict(world.model.state_dict()), "method": dict(world.method.state_dict())}


#: Every method of the catalogue, in each of its forms.
EVERY = [
    *KINDS,
    *(name for name, made in METHODS.items() if made.card.acts in ("head", "parameter")),
]
EVERY_METHOD = pytest.mark.parametrize("name", EVERY)


def test_the_whole_catalogue_is_tried() -> None:
    tried = {KINDS[name].method if name in KINDS else name for name in EVERY}
    assert tried == set(METHODS)


@EVERY_METHOD
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_nobody_looks_where_nothing_is(name: str, count: int, case: str) -> None:
    """Whatever stands there decides nothing, makes nothing NaN, and has no gradient."""
    first, second = World(name, count), World(name, count)
    for step in range(3):
        masks = masks_of(case, count, step)
        found = first.step(step, masks)
        assert differences(second.step(step, masks, 7.0), found) == []
        of_gone = [p.grad for p in first.encoders["m1"].parameters()]
        if case == "one is gone":
            assert not any(bool(g.any()) for g in of_gone if g is not None)
        for p in first.model.parameters():
            assert bool(p.isfinite().all())
    assert differences(state_of(first), state_of(second)) == []
    for x in tree_leaves(dict(first.method.state_dict())):
        assert not isinstance(x, Tensor) or bool(x.isfinite().all())


@EVERY_METHOD
@pytest.mark.parametrize("count", [2, 3])
def test_with_all_present_nothing_changes(name: str, count: int) -> None:
    plain, told = World(name, count), World(name, count)
    everyone = {f"m{m}": torch.ones(ROWS, dtype=torch.bool) for m in range(count)}
    for step in range(3):
        want, found = plain.step(step, None), told.step(step, everyone)
        assert len(found) == len(want)
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, equal_nan=True)


@EVERY_METHOD
def test_masks_decide(name: str) -> None:
    """Another mask is another step, or all of the above would hold of one that is not looked at."""
    found = []
    for shift in (0, 1):
        world, out = World(name, 3), []
        for step in range(2):
            masks = {n: m.roll(shift) for n, m in masks_of("30 %", 3, step).items()}
            out += world.step(step, masks)
        found.append(out)
    assert differences(found[0], found[1]) != []


@pytest.mark.parametrize("name", METHODS)
def test_a_signature_has_the_masks(name: str) -> None:
    made = METHODS[name]
    entry = made.forward if issubclass(made, nn.Module) and name != "MLA" else None
    entry = entry or getattr(made, "step", None) or made.weights
    taken = signature(entry).parameters
    assert any(p == "more" or p.endswith("present") for p in taken), taken


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", DROPPING)
def test_features_of_missing_inputs_pass_as_they_are(kind: str, training: bool) -> None:
    """So the documents tell users to set them to zero for the head, also in an evaluation."""
    names = ("m0", "m1")
    method = make(kind, dict.fromkeys(names)).train(training)
    masks = masks_of("30 %", 2, 0)
    features = {name: torch.rand(ROWS, WIDTH) + 1 for name in names}
    if kind == "OPM":
        scored = {name: torch.randn(ROWS, CLASSES) for name in names}
        for _ in range(2):  # it drops in its second step
            out = method(features, scored, torch.zeros(ROWS).long(), present=masks)
    else:
        out = method(features, present=masks)
    passed = []
    for m, name in enumerate(names):
        kept = out.keep[m] if training or kind != "OPM" else masks[name]
        assert not kept[~masks[name]].any()
        assert torch.equal(out.features[name][kept], features[name][kept])
        passed.append(out.features[name][~masks[name]].abs().sum(1) > 0)
    assert torch.cat(passed).any() if training else torch.cat(passed).all()
