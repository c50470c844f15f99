"""A method that is copied or pickled together with its model goes on with the copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancing import (
    IN_FORWARD,
    KINDS,
    ON_GRADIENTS,
    ON_UPDATES,
    Shown,
    acted,
    balance,
    make,
    see,
    show,
    start,
)
from networks import AudioVisual, batch
from ranks import ranks
from states import differences

from mmfuse import NoiseStream


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


def shown(model: AudioVisual, method: Any, data: Any) -> Shown:
    inputs = {"audio": data[0], "visual": data[1]}
    features = {name: net(inputs[name]) for name, net in model.encoders.items()}
    return show(method, model.fc, see(model.fc, features, inputs, data[2]))


def step(model: AudioVisual, method: Any, data: Any, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05)
    optimizer.zero_grad()
    out = balance(method, shown(model, method, data))
    optimizer.step()
    return out


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_go_on_alike(kind: str, how: str) -> None:
    model = AudioVisual()
    method = make(kind, model.encoders, stream=NoiseStream(3))
    start(method)
    step(model, method, batch())
    other, copied = COPIES[how]((model, method))
    if kind in ON_GRADIENTS:
        parameters = {id(p) for p in other.parameters()}
        assert all(id(p) in parameters for p in copied.modalities.parameters)
        assert copied.modalities.guard.marks is None
    for _ in range(2):
        data = batch()
        step(model, method, data)
        step(other, copied, data)
        assert differences(dict(other.state_dict()), dict(model.state_dict())) == []
        assert differences(dict(copied.state_dict()), dict(method.state_dict())) == []


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ON_UPDATES)
def test_the_copy_of_an_attached_optimizer_is_attached(kind: str, how: str) -> None:
    model = AudioVisual()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    method = make(kind, model.encoders, apply_to="update")
    method.attach(optimizer)
    start(method)
    step(model, method, batch(), optimizer)
    other, copied, another = COPIES[how]((model, method, optimizer))
    data = batch()
    before = copy.deepcopy(dict(other.state_dict()))
    out = step(model, method, data, optimizer)
    step(other, copied, data, another)
    assert acted(method, [out])
    assert differences(dict(other.state_dict()), before)
    assert differences(dict(other.state_dict()), dict(model.state_dict())) == []
    with pytest.raises(ValueError, match="attached already"):
        copied.attach(another)
    with pytest.raises(RuntimeError, match="has not decided about this step"):
        another.step()


def in_a_group(rank: int, kind: str) -> tuple[Any, Any]:
    group = dist.new_group([0, 1])
    torch.manual_seed(0)
    model = AudioVisual()
    method = make(kind, model.encoders, process_group=group)
    with pytest.raises(TypeError, match=r"a process_group belongs to its process.*state_dict\(\)"):
        pickle.dumps((model, method))
    other, copied = copy.deepcopy((model, method))
    assert copied.process_group is group
    torch.manual_seed(1 + rank)
    data = batch()
    for net, each in ((model, method), (other, copied)):
        start(each)
        if kind in IN_FORWARD:
            shown(net, each, data)
        else:
            step(net, each, data)
    return dict(copied.state_dict()), dict(method.state_dict())


@pytest.mark.slow_except_for("OPM")
@pytest.mark.parametrize("kind", ["OPM", "OGM-GE", "RedReg"])
def test_a_process_group_is_shared_by_copies_and_cannot_be_pickled(kind: str) -> None:
    for ours, theirs in ranks(2).run(in_a_group, kind):
        assert differences(ours, theirs) == []
