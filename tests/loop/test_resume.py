"""A method's state: every method of the catalogue goes on with the numbers of the run it left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import ANCHORED, STEPPING, make, start
from linear import Networks


def step(nets: Networks, method: Any, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    for encoder in nets.encoders.values():
        for p in encoder.parameters():
            p.grad = torch.randn_like(p)
    out = method.step(**nets.given(method))
    grads = [p.grad for e in nets.encoders.values() for p in e.parameters()]
    return [out.coefficients, out.scores, *grads]


@pytest.mark.parametrize("kind", STEPPING)
def test_a_loaded_state_goes_on_with_the_same_numbers(kind: str) -> None:
    nets = Networks(2)
    method = nets.method(kind)
    for seed in range(3):
        step(nets, method, seed)
    saved = copy.deepcopy(method.state_dict())
    want = step(nets, method, 9)

    other = make(kind, nets.encoders)
    if kind in ANCHORED:
        start(other)
    other.load_state_dict(saved)
    found = step(nets, other, 9)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_what_does_not_fit_changes_nothing() -> None:
    nets = Networks(2)
    method = nets.method("InfoReg")
    step(nets, method, 0)
    saved = copy.deepcopy(method.state_dict())
    wrong = copy.deepcopy(saved)
    wrong["state"]["steps"] = torch.zeros(5)
    step(nets, method, 1)
    now = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"'steps' in the state of InfoReg must be a tensor of"):
        method.load_state_dict(wrong)
    torch.testing.assert_close(dict(method.state_dict()["state"]), dict(now["state"]))
