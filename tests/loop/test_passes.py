"""Our passes through a user's modules: their inputs, and the traces that they must not leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfuse.loop.passes import scoring, training

CPU = torch.device("cpu")


class Drawing(nn.Module):
    """Draws a random number and counts in a buffer in every mode; one buffer is None."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.norm(x) + torch.rand(())


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: lambda x: m(x)], ids=["module", "callable"]
)
@pytest.mark.parametrize("kind", [scoring, training])
def test_nothing_is_left(kind: Any, wrap: Callable[[nn.Module], Any]) -> None:
    module = Drawing()
    module.norm.eval()
    before = {name: (id(b), b.clone()) for name, b in module.named_buffers()}
    state = torch.get_rng_state()
    call = wrap(module)
    with kind(call, CPU):
        call(torch.randn(4, 3))
        call(torch.randn(4, 3))
    assert module.seen == [(kind is training, kind is training)] * 2
    assert module.training and not module.norm.training and torch.is_grad_enabled()
    assert {name: id(b) for name, b in module.named_buffers()} == {
        name: place for name, (place, _) in before.items()
    }
    for name, b in module.named_buffers():
        assert torch.equal(b, before[name][1]), name
    assert "nothing" in module._buffers
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn.modules.module._global_forward_pre_hooks


def test_copies_last_for_all_of_the_passes() -> None:
    """The second call in it sees what the first has counted, as in any two calls."""
    module = Drawing()
    with training(module, CPU):
        module(torch.randn(4, 3))
        module(torch.randn(4, 3))
        assert module.calls == 2
    assert module.calls == 0


def test_a_hook_of_the_user_runs() -> None:
    calls: list[int] = []
    module = Drawing()
    module.register_forward_hook(lambda *_: calls.append(1))
    with scoring(module, CPU):
        module(torch.randn(4, 3))
    assert calls == [1]
