"""A method's state: every method of the catalogue goes on with the numbers of the run it left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import ANCHORED, ON_GRADIENTS, STATEFUL, STEPPING, make, start
from linear import Networks
from states import differences


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


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_encoders_in_another_order_are_refused(kind: str) -> None:
    """Their shapes are alike, so that nothing else would tell; but for a method without a state."""
    nets = Networks(2)
    method, turned = make(kind, nets.encoders), make(kind, dict(reversed(nets.encoders.items())))
    for each in (method, turned):
        start(each)
    saved, before = copy.deepcopy(method.state_dict()), copy.deepcopy(turned.state_dict())
    assert saved["modalities"] == ["audio", "visual"]
    if kind not in (*STATEFUL, *ANCHORED):
        turned.load_state_dict(saved)
        return
    told = r"=\['audio', 'visual'\], in this order, but .* encoders=\['visual', 'audio'\]: make"
    with pytest.raises(ValueError, match=told):
        turned.load_state_dict(saved)
    assert differences(turned.state_dict(), before) == []
    renamed = make(kind, {"audio": nets.encoders["audio"], "image": nets.encoders["visual"]})
    with pytest.raises(
        ValueError, match=r"'visual'\], in this order, .*=\['audio', 'image'\]: make"
    ):
        renamed.load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"'modalities' in the state of .* must be a list, got int"
    ):
        method.load_state_dict(saved | {"modalities": 2})
    del saved["modalities"]  # as mmfuse saved it before
    turned.load_state_dict(saved)


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
