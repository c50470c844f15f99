"""Encoders that are changed after a method was made: its list of parameters is the old one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from balancing import LOGITS_ONLY, start
from torch import Tensor, nn

import mmfuse
from mmfuse import METHODS
from mmfuse.loop import _surgery

LABELS = torch.tensor([0, 1, 2, 0])


class LoRA(nn.Module):
    """A frozen linear layer and a product beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def encoders() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {n: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) for n in ("audio", "visual")}
    )


def step(method: Any, nets: nn.ModuleDict) -> Any:
    nets.zero_grad()
    logits = {n: net(torch.ones(4, 5)) for n, net in nets.items()}
    sum(z.square().sum() for z in logits.values()).backward()
    return method.step(logits, LABELS)


def insert(nets: nn.ModuleDict) -> None:
    for net in nets.values():
        net[0] = LoRA(net[0])


def append(nets: nn.ModuleDict) -> None:
    nets["visual"].append(nn.Linear(3, 3))


def replace(nets: nn.ModuleDict) -> None:
    nets["visual"][1] = nn.Linear(4, 3)


def new_weight(nets: nn.ModuleDict) -> None:
    nets["audio"][0].weight = nn.Parameter(torch.randn(4, 5))


def parametrize(nets: nn.ModuleDict) -> None:
    nn.utils.parametrizations.weight_norm(nets["audio"][0])


def by_name(nets: nn.ModuleDict) -> None:
    nets["audio"][0].register_parameter("gain", nn.Parameter(torch.ones(4)))


CHANGES: dict[str, tuple[Callable[[nn.ModuleDict], None], str]] = {
    "LoRA in both": (insert, r"encoders\['audio'\]\.0\.down\.weight is new"),
    "an appended layer": (append, r"encoders\['visual'\]\.2\.weight is new"),
    "a replaced layer": (replace, r"encoders\['visual'\]\.1\.weight is new"),
    "a replaced weight": (new_weight, r"encoders\['audio'\]\.0\.weight is new"),
    "a parametrized layer": (parametrize, r"encoders\['audio'\]\.0\.parametrizations.* is new"),
    "a registered parameter": (by_name, r"encoders\['audio'\]\.0\.gain is new"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_the_next_step_raises(name: str, change: str) -> None:
    """Old parameters may go on having gradients, so that none is missing."""
    nets = encoders()
    method = METHODS[name](dict(nets))
    start(method)
    step(method, nets)
    operate, message = CHANGES[change]
    operate(nets)
    state = [t.clone() for t in method._state.values()]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            step(method, nets)
    assert all(torch.equal(a, b) for a, b in zip(state, method._state.values(), strict=True))
    again = METHODS[name](dict(nets))
    start(again)
    assert step(again, nets).finite


def test_other_modules_cost_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = encoders()
    method = mmfuse.OGM(dict(nets))
    looks: list[int] = []
    real = type(method.modalities).check_unchanged
    monkeypatch.setattr(
        type(method.modalities), "check_unchanged", lambda self: (looks.append(1), real(self))
    )
    step(method, nets)
    looks.clear()
    step(method, nets)
    assert not looks, "nothing was registered"
    head = nn.Sequential(nn.Linear(3, 3))
    head.append(nn.Linear(3, 3))
    step(method, nets)
    step(method, nets)
    assert len(looks) == 1


def test_the_hooks_are_registered_once() -> None:
    before = len(nn.modules.module._global_parameter_registration_hooks)
    for _ in range(3):
        mmfuse.OGM(dict(encoders()))
    assert len(nn.modules.module._global_parameter_registration_hooks) == before == 1
    count = _surgery.registrations
    nn.Linear(2, 2)
    assert _surgery.registrations == count + 2
