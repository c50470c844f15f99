"""Results and methods at the prompt: by the names of the modalities."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from balancing import IN_FORWARD, KINDS, ON_GRADIENTS, balance, make, see, show, start
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmfuse
from mmfuse.loop.drawing import DrawingModule
from mmfuse.loop.result import Result


@dataclasses.dataclass(frozen=True)
class _Own(Result):
    coefficients: torch.Tensor
    joint: torch.Tensor
    share: torch.Tensor


def _own(**more: tuple[str, ...]) -> _Own:
    return _Own(torch.tensor([0.25, 1.0]), torch.zeros(8, 3), torch.tensor(0.5), **more)


def test_repr_is_by_name() -> None:
    shown = repr(_own(modalities=("audio", "video")))
    assert shown == "_Own(coefficients={audio: 0.25, video: 1}, joint=Tensor[8, 3], share=0.5)"


def test_repr_without_names() -> None:
    assert repr(_own()) == "_Own(coefficients=[0.25, 1], joint=Tensor[8, 3], share=0.5)"


def test_as_dict() -> None:
    found = _own(modalities=("audio", "video")).as_dict()
    assert {tag: value.item() for tag, value in found.items()} == {
        "coefficients/audio": 0.25,
        "coefficients/video": 1.0,
        "share": 0.5,
    }
    assert list(_own().as_dict()) == ["coefficients/0", "coefficients/1", "share"]


def test_as_dict_shares_memory() -> None:
    own = _own(modalities=("audio", "video"))
    own.coefficients[0] = 3.0
    assert own.as_dict()["coefficients/audio"].item() == 3.0


def test_a_value_that_cannot_be_read_is_shown_by_its_shape() -> None:
    with FakeTensorMode():
        assert "coefficients=Tensor[2]" in repr(_own(modalities=("audio", "video")))
        assert repr(mmfuse.NoiseStream(3)) == "NoiseStream(device='cpu')"
    assert repr(mmfuse.NoiseStream(3)) == "NoiseStream(key=3, step=0, device='cpu')"


@pytest.mark.parametrize("names", [("audio", "visual"), ("text", "audio", "visual")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_names_its_modalities(kind: str, names: tuple[str, ...]) -> None:
    """A step's result has the names; `repr` shows no feature, and every vector by name."""
    result = _step(kind, names)
    assert isinstance(result, Result)
    assert result.modalities == names
    tags = result.as_dict()
    assert all(value.dim() == 0 for value in tags.values())
    named = {tag.split("/")[0] for tag in tags if "/" in tag} - set(result.entries)
    assert all(f"{field}/{name}" in tags for field in named for name in names)
    shown = repr(result)
    assert "tensor(" not in shown
    assert all(f"{field}={{{names[0]}: " in shown for field in named)


def _step(kind: str, names: tuple[str, ...]) -> Any:
    torch.manual_seed(0)
    inputs = {name: torch.randn(8, 5) for name in names}
    encoders: dict[str, nn.Module] = {name: nn.Linear(5, 4) for name in names}
    head = nn.Linear(4 * len(names), 3)
    many = {} if kind in ON_GRADIENTS else {"num_modalities": len(names)}
    method = make(kind, encoders, **many)
    start(method)
    features = {name: encoders[name](x) for name, x in inputs.items()}
    seen = see(head, features, inputs, torch.arange(8) % 3)
    return balance(method, show(method, head, seen))


def test_a_method_between_epochs_names_its_modalities() -> None:
    encoders = {name: nn.Linear(5, 4) for name in ("audio", "visual")}
    features = {name: torch.randn(12, 4) for name in encoders}
    labels = torch.arange(12) % 3
    found = mmfuse.ReLearning(encoders).weights(features, labels, features, labels)
    assert set(found.as_dict()) == {"coefficients/audio", "coefficients/visual"}


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_a_method_on_gradients_shows_its_rule_and_parameters(kind: str) -> None:
    encoders = {"audio": nn.Linear(5, 4), "visual": nn.Linear(7, 4, bias=False)}
    method = make(kind, encoders)
    text = repr(method)
    assert text.startswith(f"{type(method).__name__}({type(method.rule).__name__}(")
    assert "  audio: 24 parameters in 2 tensors" in text
    assert text.endswith("  visual: 28 parameters in 1 tensor")
    assert ("stream=NoiseStream(key=" in text) == method.rule.need.stream
    assert " at 0x" not in text


@pytest.mark.parametrize("kind", IN_FORWARD)
def test_a_module_shows_its_hyper_parameters(kind: str) -> None:
    method = make(kind, {}, starts=2, ends=9)
    text = repr(method)
    where = f"acts={type(method).card.acts!r}"
    assert f"num_modalities=2, starts=2, ends=9, epoch=0, {where}" in text
    assert ("stream=NoiseStream(key=" in text) == isinstance(method, DrawingModule)
    assert " at 0x" not in text


def test_a_method_between_epochs_shows_its_rule_and_parameters() -> None:
    encoders = {"audio": nn.Linear(5, 4), "visual": nn.Linear(7, 4, bias=False)}
    assert repr(mmfuse.ReLearning(encoders, every=5, ends=40)) == (
        "ReLearning(ReLearningRule(lam=3.0, every=5, times=3), acts='parameter', "
        "starts=0, ends=40, epoch=0)\n"
        "  audio: 24 parameters in 2 tensors\n"
        "  visual: 28 parameters in 1 tensor"
    )


@pytest.mark.parametrize("module", [mmfuse, mmfuse.ops], ids=lambda module: module.__name__)
def test_nothing_public_is_shown_by_its_address(module: ModuleType) -> None:
    found = [getattr(module, name) for name in dir(module) if not name.startswith("_")]
    classes = [one for one in found if isinstance(one, type)]
    assert len(classes) > 10
    assert [one.__name__ for one in classes if one.__repr__ is object.__repr__] == []
