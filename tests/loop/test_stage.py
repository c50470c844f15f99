"""One step, stage by stage: in which order a rule is called, and with what."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

import mmfuse
from mmfuse.methods.inforeg import InfoRegRule


class Spy(InfoRegRule):
    """Notes its calls."""

    calls: ClassVar[list[tuple[str, Any]]] = []

    def sense(self, batch: Any) -> Any:
        self.calls.append(("sense", batch.clock))
        return super().sense(batch)

    def decide(self, state: Any, seen: Any, tensors: Any, clock: Any) -> Any:
        self.calls.append(("decide", tensors.owner))
        return super().decide(state, seen, tensors, clock)

    def settle(self, state: Any, squares: Any, tensors: Any) -> Any:
        self.calls.append(("settle", squares.shape))
        return super().settle(state, squares, tensors)

    def epoch(self, state: Any, epoch: int, tensors: Any) -> Any:
        self.calls.append(("epoch", epoch))
        return super().epoch(state, epoch, tensors)


def test_the_order_of_the_stages() -> None:
    nets = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    Spy.calls.clear()
    method = mmfuse.GradientMethod(Spy(), nets)
    method.set_epoch(4)
    logits = {name: net(torch.randn(2, 3)) for name, net in nets.items()}
    nets["b"].bias.requires_grad_(False)
    sum(z.square().sum() for z in logits.values()).backward()
    nets["b"].bias.grad = None
    method.step(logits, torch.tensor([0, 1]))
    assert Spy.calls == [
        ("epoch", 4),
        ("sense", (4, 0)),
        ("decide", (0, 0, 1)),
        ("settle", (3,)),
    ]


def test_without_gradients_there_is_nothing_to_settle() -> None:
    nets = {name: nn.Linear(3, 2).requires_grad_(False) for name in "ab"}
    Spy.calls.clear()
    method = mmfuse.GradientMethod(Spy(), nets)
    method.set_epoch(0)
    out = method.step({name: torch.randn(2, 2) for name in nets}, torch.tensor([0, 1]))
    assert out.finite
    assert [name for name, _ in Spy.calls] == ["epoch", "sense", "decide"]
