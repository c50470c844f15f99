"""Several methods in one training step: their order, and the warning if it matters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from balancing import COMPARING, make, start
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse.loop import _in_turn

FACTORS = ["OGM", "MLB", "LearningRates"]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    _in_turn._told.clear()
    _in_turn.latest = None
    yield
    _in_turn._told.clear()


class Net:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoders = {name: nn.Linear(3, 4) for name in ("audio", "visual")}
        self.inputs = {name: torch.randn(6, 3) for name in self.encoders}
        self.labels = torch.tensor([0, 1, 2, 3, 0, 1])

    def forward(self) -> dict[str, Tensor]:
        every = enumerate(self.encoders.items(), start=1)
        return {name: i * encoder(self.inputs[name]) for i, (name, encoder) in every}

    def backward(self) -> dict[str, Tensor]:
        for net in self.encoders.values():
            net.zero_grad()
        z = {
            name: (i + 1) * net(self.inputs[name])
            for i, (name, net) in enumerate(self.encoders.items())
        }
        F.cross_entropy(sum(z.values()), self.labels).backward()
        return {name: x.detach() for name, x in z.items()}

    def step(self, method: mmfuse.GradientMethod, logits: dict[str, Tensor]) -> None:
        features = {name: net(self.inputs[name]).detach() for name, net in self.encoders.items()}
        every = {"features": features, "inputs": self.inputs}
        method.step(logits, self.labels, **{name: every[name] for name in method.rule.need.inputs})

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for net in self.encoders.values() for p in net.parameters()]


def ready(kind: str, net: Net) -> mmfuse.GradientMethod:
    method: mmfuse.GradientMethod = make(kind, net.encoders, stream=mmfuse.NoiseStream(3))
    start(method)
    return method


@pytest.mark.parametrize("kind", COMPARING)
def test_two_that_do_not_commute_say_so_once(kind: str) -> None:
    net = Net()
    first, second = ready("OGM-GE", net), ready(kind, net)
    for step in range(2):
        logits = net.backward()
        net.step(first, logits)
        if step == 0:
            with pytest.warns(RuntimeWarning, match=f"is OGM, then {second.name}$"):
                net.step(second, logits)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                net.step(second, logits)


@pytest.mark.parametrize(("one", "other"), list(permutations(FACTORS, 2)))
def test_factors_commute(one: str, other: str) -> None:
    found = []
    for order in ((one, other), (other, one)):
        net = Net()
        methods = [ready(kind, net) for kind in order]
        logits = net.backward()
        for method in methods:
            net.step(method, logits)
        found.append(net.gradients())
    torch.testing.assert_close(*found)


def test_steps_of_their_own_are_no_conflict() -> None:
    """Two methods in turns, each after a backward pass of its own; or outside of its epochs."""
    net = Net()
    first, second = ready("OGM-GE", net), ready("InfoReg", net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (first, second, first, second):
            net.step(method, net.backward())
        idle = make("OGM-GE", net.encoders, starts=9)
        idle.set_epoch(0)
        logits = net.backward()
        net.step(idle, logits)
        net.step(first, logits)


def test_other_encoders_are_no_conflict() -> None:
    nets = Net(), Net()
    methods = [ready("OGM-GE", net) for net in nets]
    logits = [net.backward() for net in nets]
    for net, method, z in zip(nets, methods, logits, strict=True):
        net.step(method, z)


def test_opm_and_ogm_decide_from_the_same_scores() -> None:
    """The paper's OPM + OGM: in the forward pass and after it, by the undropped logits."""
    net = Net()
    head = nn.Linear(8, 4)
    opm = mmfuse.OPM(stream=mmfuse.NoiseStream(1))
    ogm = mmfuse.OGM(net.encoders, stream=mmfuse.NoiseStream(2))
    features = {name: encoder(net.inputs[name]) for name, encoder in net.encoders.items()}
    logits = mmfuse.unimodal_logits(head, features)
    kept = opm(features, logits, net.labels)
    loss = F.cross_entropy(head(torch.cat(list(kept.features.values()), 1)), net.labels)
    out = ogm.backward(loss, logits, net.labels)
    torch.testing.assert_close(out.scores, kept.scores)
    torch.testing.assert_close(out.ratios, kept.ratios)


def test_unimodal_losses_go_with_any() -> None:
    """They are a part of the loss, and the method gets the gradient of the sum."""
    net = Net()
    logits = net.backward()
    joint = net.gradients()
    z = {
        name: (i + 1) * encoder(net.inputs[name])
        for i, (name, encoder) in enumerate(net.encoders.items())
    }
    sum(mmfuse.unimodal_losses(z, net.labels).values()).backward()
    both = net.gradients()
    assert all(not torch.equal(a, b) for a, b in zip(joint, both, strict=True))
    mlb = ready("MLB", net)
    out = mlb.step(logits, net.labels)
    factors = [float(k) for k in out.coefficients for _ in range(2)]
    torch.testing.assert_close(net.gradients(), [k * g for k, g in zip(factors, both, strict=True)])
