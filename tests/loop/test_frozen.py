"""Encoders with frozen parameters: quantised ones, and backbones that need no copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balancing import ANCHORED, ON_GRADIENTS, balance, make, see, show, start
from networks import AudioVisual, batch
from states import differences
from torch import nn

from mmfuse import NoiseStream

QUANTISED = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool]


def step(model: AudioVisual, method: Any, data: Any) -> Any:
    model.zero_grad()
    inputs = {"audio": data[0], "visual": data[1]}
    features = {name: net(inputs[name]) for name, net in model.encoders.items()}
    return balance(method, show(method, model.fc, see(model.fc, features, inputs, data[2])))


def with_frozen(model: AudioVisual, dtype: torch.dtype) -> AudioVisual:
    for net in model.encoders.values():
        quantised = torch.zeros(4, 4).to(dtype)
        net.register_parameter("quantised", nn.Parameter(quantised, requires_grad=False))
    return model


@pytest.mark.parametrize("select", ["all", "matrix", lambda p: p.dtype == torch.float32])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_quantised_parameters_stand_aside(kind: str, dtype: torch.dtype, select: Any) -> None:
    model = with_frozen(AudioVisual(), dtype)
    method = make(kind, model.encoders, select=select)
    start(method)
    step(model, method, batch())
    assert all(p.dtype == torch.float32 for p in method.modalities.parameters)
    method.set_epoch(method.epoch + 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_one_that_can_get_a_gradient_is_refused(kind: str, dtype: torch.dtype) -> None:
    model = with_frozen(AudioVisual(), dtype)
    model.audio_net.quantised.requires_grad_()
    with pytest.raises(TypeError, match=r"encoders\['audio'\].quantised has dtype"):
        make(kind, model.encoders)
    make(kind, model.encoders, select=lambda p: p.dtype == torch.float32)


def frozen(model: AudioVisual) -> list[nn.Parameter]:
    """All of the encoders but for the last parameter of each."""
    found = [p for net in model.encoders.values() for p in list(net.parameters())[:-1]]
    for p in found:
        p.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", ANCHORED)
def test_frozen_parameters_are_not_copied(kind: str) -> None:
    model = AudioVisual()
    ids = {id(p) for p in frozen(model)}
    method = make(kind, model.encoders)
    start(method)
    pairs = zip(method.anchors.tensors, method.modalities.parameters, strict=True)
    assert all((a.numel() == 0) == (id(p) in ids) for a, p in pairs)
    step(model, method, batch())
    saved = method.state_dict()["anchors"]["tensors"]
    assert [t.numel() > 0 for t in saved] == [
        id(p) not in ids for p in method.modalities.parameters
    ]


@pytest.mark.parametrize("kind", ANCHORED)
def test_unfrozen_within_an_epoch_they_are_what_they_were(kind: str) -> None:
    """The result is as if all had been copied: a frozen parameter does not change."""
    model = AudioVisual()
    other = copy.deepcopy(model)
    methods = []
    for net in (model, other):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        waiting = frozen(net) if net is model else []
        torch.manual_seed(4)
        method = make(kind, net.encoders, stream=NoiseStream(3))
        start(method)
        waiting = waiting or frozen(net)
        step(net, method, batch())
        optimizer.step()
        for p in waiting:
            p.requires_grad_()
        for _ in range(2):
            step(net, method, batch())
            optimizer.step()
        methods.append(method)
    assert differences(dict(model.state_dict()), dict(other.state_dict())) == []
    anchors, expected = (method.anchors.tensors for method in methods)
    assert all(torch.equal(a, b) for a, b in zip(anchors, expected, strict=True))


@pytest.mark.parametrize("kind", ANCHORED)
def test_an_error_copies_nothing_that_was_unfrozen(kind: str) -> None:
    model = AudioVisual()
    waiting = frozen(model)
    method = make(kind, model.encoders)
    start(method)
    for p in waiting:
        p.requires_grad_()
    with torch.no_grad():
        for p in method.modalities.parameters:
            p.grad = torch.ones_like(p)
    before = [a.clone() for a in method.anchors.tensors]
    with pytest.raises((TypeError, ValueError, RuntimeError), match="logits"):
        method.step()
    found = method.anchors.tensors
    assert [a.shape for a in found] == [a.shape for a in before]
    assert all(map(torch.equal, found, before))


@pytest.mark.parametrize("kind", ANCHORED)
def test_their_state_is_read_back(kind: str) -> None:
    model = AudioVisual()
    frozen(model)
    method = make(kind, model.encoders)
    start(method)
    step(model, method, batch())
    state = copy.deepcopy(method.state_dict())
    other = make(kind, model.encoders)
    other.load_state_dict(state)
    assert differences(other.state_dict(), state) == []
    fresh = make(kind, model.encoders).state_dict()["anchors"]["tensors"]
    assert [t.shape for t in fresh] == [t.shape for t in state["anchors"]["tensors"]]
