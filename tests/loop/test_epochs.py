"""EpochWindow: the epochs in which a method acts."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, prepare
from torch import nn

import mmfuse
from mmfuse import METHODS
from mmfuse.loop.epochs import EpochWindow


class Method(EpochWindow):
    def __init__(self, starts: int, ends: int | None) -> None:
        self._set_window(starts, ends)


@pytest.mark.parametrize(
    ("starts", "ends", "acts"),
    [(0, None, [0, 1, 2, 3]), (1, 2, [1, 2]), (2, 2, [2]), (3, None, [3]), (5, 9, [])],
)
def test_both_ends_are_included(starts: int, ends: int | None, acts: list[int]) -> None:
    method = Method(starts, ends)
    assert method.modulating == (starts == 0)  # epoch 0, before the first set_epoch
    found = []
    for epoch in range(4):
        method.set_epoch(epoch)
        if method.modulating:
            found.append(epoch)
    assert found == acts


def test_a_new_run_begins_before_its_first_epoch() -> None:
    method = Method(1, None)
    method.set_epoch(4)
    method.begin()
    assert (method.epoch, method.modulating) == (0, False)


@pytest.mark.parametrize("made", [mmfuse.OPM, mmfuse.ARM])
def test_the_epoch_of_a_module_is_in_its_state(made: type[nn.Module]) -> None:
    one, other = made(), made()
    one.set_epoch(3)
    other.load_state_dict(one.state_dict())
    assert other.epoch == 3
    old = {**one.state_dict(), "_extra_state": {"epoch": 3}}
    with pytest.raises(ValueError, match=f"the state of {made.__name__} has no format number"):
        other.load_state_dict(old)


def test_outside_of_its_epochs_arm_weights_nothing() -> None:
    arm = mmfuse.ARM(bins=4, starts=1)
    features = {name: torch.randn(5, 3) for name in ("audio", "visual")}
    logits = {name: torch.randn(5, 2) for name in features}
    arguments = (
        features,
        torch.randn(5, 3),
        logits,
        torch.randn(5, 2),
        torch.tensor([0, 1] * 2 + [0]),
    )
    arm.set_epoch(0)
    out = arm(*arguments)
    assert out.weights.tolist() == [1.0, 1.0]
    assert all(torch.equal(out.features[name], feature) for name, feature in features.items())
    arm.set_epoch(1)
    assert arm(*arguments).weights.tolist() != [1.0, 1.0]


def test_a_window_that_ends_before_it_starts() -> None:
    with pytest.raises(ValueError, match="ends=1 is before starts=2"):
        Method(2, 1)


def call(name: str, module: nn.Module) -> Any:
    features = {n: torch.randn(6, 4) for n in ("audio", "visual")}
    seen = {
        "features": features,
        "fused": sum(features.values()),
        "logits": {n: torch.randn(6, 3) for n in features},
        "fused_logits": torch.randn(6, 3),
    }
    takes = signature(module.forward).parameters
    seen["labels"] = torch.arange(6) % 3
    prepare(module, dict.fromkeys(features, 4), 3, features["audio"])
    return module(**{k: v for k, v in seen.items() if k in takes})


@pytest.mark.parametrize("name", IN_FORWARD)
def test_an_evaluation_in_training_mode_is_warned_of_once(name: str) -> None:
    """A method that is no submodule of the model is not reached by model.eval()."""
    outside, model = METHODS[name](), nn.Module()
    model.eval()
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=f"{name} is in training mode, but no gradients"):
            call(name, outside)
        call(name, outside)  # warnings are errors in the tests
    model.balance = METHODS[name]()
    model.eval()
    with torch.no_grad():
        call(name, model.balance)
    call(name, model.train().balance)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if issubclass(m, nn.Module)])
def test_no_module_trains_in_replicas(name: str) -> None:
    """nn.DataParallel asks each module for its copy, on several GPUs alone."""
    kind = METHODS[name]
    method = kind(nn.Linear(3, 2)) if "head" in signature(kind).parameters else kind()
    message = rf"^{name} cannot train in torch\.nn\.DataParallel, .*\.DistributedDataParallel$"
    with pytest.raises(RuntimeError, match=message):
        method._replicate_for_data_parallel()
    assert method.eval()._replicate_for_data_parallel()._is_replica
