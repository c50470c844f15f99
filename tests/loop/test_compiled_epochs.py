"""A compiled step over many epochs is compiled once: the epoch is a number of the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, LEARNING, MONITORING, STEPPING, arguments, make, see, show
from networks import AudioVisual, batch
from states import differences
from torch import Tensor

from mmfuse import NoiseStream

EPOCHS = 20
# One on features, one on gradients, one that keeps anchors; `make check` runs the rest.
QUICK = {"OPM", "OGM-GE", "InfoReg"}
KINDS = [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
    for kind in (*IN_FORWARD, *STEPPING)
]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: detached(value) for name, value in values.items()}
    return values.detach()


def seen(model: AudioVisual, method: Any, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """The method's arguments, after a backward pass that leaves gradients for it."""
    model.zero_grad()
    inputs = {"audio": data[0], "visual": data[1]}
    features = {name: net(inputs[name]) for name, net in model.encoders.items()}
    found = see(model.fc, features, inputs, data[2])
    if not isinstance(method, torch.nn.Module):
        show(method, model.fc, found).loss.backward()
    return {name: detached(value) for name, value in arguments(method, found).items()}


@pytest.mark.parametrize(
    "window",
    [pytest.param({"ends": 50}, marks=pytest.mark.slow), {"starts": 4, "ends": 12}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_compiled_once(kind: str, window: dict[str, int]) -> None:
    """Twice if the method does not act in all epochs; a monitor adds steps with and without it.

    Once more in the second step, if the first one has shown the modalities' names.
    """
    models = [AudioVisual()]
    models.append(copy.deepcopy(models[0]))
    methods = [make(kind, net.encoders, stream=NoiseStream(3), **window) for net in models]
    eager, compiled = methods
    act = compiled if kind in IN_FORWARD else compiled.step
    # By default PyTorch takes a number that has changed for any number, one compilation later.
    dynamic = None if kind in MONITORING else False
    fast = torch.compile(act, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    starts, ends = window.get("starts", 0), window.get("ends", EPOCHS)
    for epoch in range(EPOCHS):
        for method in methods:
            method.set_epoch(epoch)
        new = {0, starts} | ({1} if kind in LEARNING else set())
        new |= {1, 2, starts + 1, ends + 1} if kind in MONITORING else set()
        with torch._dynamo.config.patch(error_on_recompile=epoch not in new):
            data = batch()
            out = fast(**seen(models[1], compiled, data))
            step = eager if kind in IN_FORWARD else eager.step
            expected = step(**seen(models[0], eager, data))
        coefficients = "weights" if hasattr(out, "weights") else "coefficients"
        if hasattr(out, coefficients):
            assert torch.equal(getattr(out, coefficients), getattr(expected, coefficients))
        assert compiled.modulating == compiled._acting == (starts <= epoch <= ends)
    assert differences(dict(compiled.state_dict()), dict(eager.state_dict())) == []
