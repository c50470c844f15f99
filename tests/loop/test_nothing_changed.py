"""An error changes nothing: findings of `make fuzz` about methods on gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import ON_GRADIENTS, STEPPING, make, see, start
from states import differences
from torch import Tensor, nn
from torch.nn import functional as F

from mmfuse import NoiseStream

NAMES = ("audio", "visual")


class Run:
    """Two encoders with gradients, a method on them, and what it may look at."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(3)
        self.encoders = {n: nn.Linear(3, 4) for n in NAMES}
        self.head = nn.Linear(8, 5)
        self.method = make(kind, self.encoders, stream=NoiseStream(5))
        start(self.method)
        inputs = {n: torch.randn(6, 3) for n in NAMES}
        features = {n: net(inputs[n]) for n, net in self.encoders.items()}
        self.seen = see(self.head, features, inputs, torch.arange(6) % 5)
        self.loss = F.cross_entropy(sum(self.seen["logits"].values()), self.seen["labels"])

    def arguments(self) -> dict[str, Any]:
        needed = ("logits", "labels", *self.method.rule.need.inputs)
        return {name: self.seen[name] for name in needed}

    def gradients(self) -> list[Tensor | None]:
        return [
            None if p.grad is None else p.grad.clone()
            for net in self.encoders.values()
            for p in net.parameters()
        ]

    def present(self) -> dict[str, Tensor]:
        return {n: torch.arange(6) != m for m, n in enumerate(NAMES)}


@pytest.mark.parametrize("kind", STEPPING)
def test_a_batch_of_another_kind_comes_before_the_backward_pass(kind: str) -> None:
    """The gradients were those of the new batch, though the method had raised an error about it."""
    run = Run(kind)
    run.method.observe(**run.arguments())
    before = run.gradients()
    with pytest.raises(TypeError, match="all of a step"):
        run.method.backward(run.loss, **run.arguments(), present=run.present())
    assert run.gradients() == before == [None] * 4


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("kind", STEPPING)
def test_what_is_no_number_of_a_scaler(kind: str, name: str) -> None:
    """The gradients were changed before a text was compared with 0."""
    run = Run(kind)
    for wrong in ("no", torch.ones(2), torch.ones(()).to_sparse(), [1.0]):
        with pytest.raises(TypeError, match=f"^{name} must be a number"):
            run.method.backward(run.loss, **run.arguments(), **{name: wrong})
    assert run.gradients() == [None] * 4
    run.loss.backward()
    before, state = run.gradients(), copy.deepcopy(dict(run.method.state_dict()))
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        run.method.step(**run.arguments(), **{name: "no"})
    assert all(torch.equal(a, b) for a, b in zip(run.gradients(), before, strict=True))
    assert differences(dict(run.method.state_dict()), state) == []


@pytest.mark.parametrize("kind", STEPPING)
def test_a_scalers_numbers_may_be_pythons(kind: str) -> None:
    """`GradScaler.get_scale` returns a float."""
    runs = []
    for scale, found in ((torch.tensor(2.0**7), torch.tensor(1.0)), (2.0**7, True)):
        run = Run(kind)
        (run.loss * 2.0**7).backward()
        run.method.step(**run.arguments(), grad_scale=scale, found_inf=found)
        runs.append((run.gradients(), dict(run.method.state_dict())))
    assert differences(*runs) == []


@pytest.mark.parametrize("kind", STEPPING)
def test_a_batch_that_is_refused_has_no_rows(kind: str) -> None:
    """Later batches drew the noise of rows that came after those of the refused one."""
    run = Run(kind)
    run.method.observe(**run.arguments())
    rows = run.method._senses._rows
    with pytest.raises(TypeError, match="all of a step"):
        run.method.observe(**run.arguments(), present=run.present())
    assert run.method._senses._rows == rows


def _changes(saved: dict[str, Any]) -> dict[str, Any]:
    """States that do not fit in one entry, by name."""
    found: dict[str, Any] = {
        "no mapping": 5,
        "an epoch in words": {**saved, "epoch": "two"},
        "half an epoch": {**saved, "epoch": 1.5},
        "a step before the first": {**saved, "step": -1},
        "no step": {**saved, "step": None},
        "a state in a list": {**saved, "state": [1]},
    }
    if saved["state"]:
        last = list(saved["state"])[-1]
        wrong = {**saved["state"], last: saved["state"][last].to("meta")}
        found["a state without values"] = {**saved, "state": wrong}
    if "stream" in saved:
        found["a stream in a list"] = {**saved, "stream": [saved["stream"]]}
    if "anchors" in saved:
        tensors = saved["anchors"]["tensors"]
        found["an anchor in a list"] = {**saved, "anchors": {"tensors": [*tensors[:-1], [1]]}}
        found["anchors in a text"] = {**saved, "anchors": {"tensors": "four"}}
        found["no anchors"] = {**saved, "anchors": None}
    return found


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_a_state_that_does_not_fit_is_refused_as_a_whole(kind: str) -> None:
    """The entries before the one that did not fit had been taken over."""
    run = Run(kind)
    saved = copy.deepcopy(run.method.state_dict())
    for tensor in saved["state"].values():
        tensor.zero_() if tensor.dtype == torch.bool else tensor.add_(1)
    now = copy.deepcopy(run.method.state_dict())
    for what, state in _changes(saved).items():
        with pytest.raises((TypeError, ValueError)):
            run.method.load_state_dict(state)
        after = run.method.state_dict()
        for name, value in now["state"].items():
            assert torch.equal(after["state"][name], value), (what, name)
        assert (after["epoch"], after["step"]) == (now["epoch"], now["step"]), what
        for one, other in zip(
            after.get("anchors", {}).get("tensors", []),
            now.get("anchors", {}).get("tensors", []),
            strict=True,
        ):
            assert torch.equal(one, other), what
