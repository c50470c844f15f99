"""A constant factor on each encoder's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import nn

import mmfuse


def nets_of(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(3, 4) for name in names}


@pytest.mark.parametrize(
    ("names", "rates", "expected"),
    [
        (("audio", "visual"), None, [1.3, 0.7]),
        (("audio", "visual", "text"), None, [0.9, 1.4, 0.7]),
        (("a", "b", "c", "d"), [0.5, 2, 0, 1], [0.5, 2, 0, 1]),
        (("audio", "visual"), {"visual": 3.0, "audio": 0.25}, [0.25, 3.0]),
    ],
)
def test_the_rates(cell: Cell, names: tuple[str, ...], rates: Any, expected: list[float]) -> None:
    nets = {name: net.to(cell.device) for name, net in nets_of(*names).items()}
    for net in nets.values():
        net.weight.grad, net.bias.grad = torch.randn_like(net.weight), torch.randn_like(net.bias)
    before = {name: [p.grad.clone() for p in net.parameters()] for name, net in nets.items()}
    logits = {name: torch.randn(5, 4, device=cell.device) for name in names}
    labels = torch.randint(0, 4, (5,), device=cell.device)
    method = mmfuse.LearningRates(nets, rates=rates, backend=cell.backend)
    out = method.step(logits, labels)
    torch.testing.assert_close(out.coefficients.cpu(), torch.tensor(expected, dtype=torch.float32))
    own = [z.softmax(1).gather(1, labels[:, None]).mean() for z in logits.values()]
    torch.testing.assert_close(out.scores, torch.stack(own))
    for (name, net), c in zip(nets.items(), expected, strict=True):
        for p, g in zip(net.parameters(), before[name], strict=True):
            torch.testing.assert_close(p.grad, c * g)


def test_with_sgd_it_is_a_learning_rate() -> None:
    """Over steps, momentum included: as parameter groups have it."""
    torch.manual_seed(0)
    kinds = []
    for by_groups in (True, False):
        torch.manual_seed(1)
        nets = nets_of("audio", "visual")
        rates = (0.5, 3.0)
        groups = [
            {"params": net.parameters(), "lr": 0.1 * (rate if by_groups else 1)}
            for net, rate in zip(nets.values(), rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        method = mmfuse.LearningRates(nets, rates=rates)
        for _ in range(5):
            x, labels = torch.randn(6, 3), torch.randint(0, 4, (6,))
            logits = {name: net(x) for name, net in nets.items()}
            optimizer.zero_grad()
            # Linear in the parameters, so that the gradients do not depend on them.
            sum((z * torch.arange(4.0)).sum() for z in logits.values()).backward()
            if not by_groups:
                method.step(logits, labels)
            optimizer.step()
        kinds.append([p.detach() for net in nets.values() for p in net.parameters()])
    torch.testing.assert_close(kinds[0], kinds[1])


@pytest.mark.parametrize(
    ("rates", "error", "text"),
    [
        ({"audio": 1.0}, ValueError, "rates must name the modalities"),
        ([1.0], ValueError, "rates must hold one number for each of .* got 1"),
        ([1.0, -1.0], ValueError, "the rate of 'visual' must be finite and at least 0"),
        ([math.nan, 1.0], ValueError, "the rate of 'audio' must be finite"),
        (["1", 1.0], TypeError, "the rate of 'audio' must be a number, got str"),
    ],
)
def test_bad_rates(rates: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.LearningRates(nets_of("audio", "visual"), rates=rates)


def test_no_rates_are_known_for_four() -> None:
    with pytest.raises(ValueError, match="give rates, one for each of the 4 modalities"):
        mmfuse.LearningRates(nets_of("a", "b", "c", "d"))


def test_a_modality_that_nobody_has_keeps_its_gradient() -> None:
    nets = nets_of("audio", "visual")
    for net in nets.values():
        net.weight.grad, net.bias.grad = torch.ones(4, 3), torch.ones(4)
    present = {"audio": torch.ones(5, dtype=torch.bool), "visual": torch.zeros(5, dtype=torch.bool)}
    logits, labels = {name: torch.randn(5, 4) for name in nets}, torch.randint(0, 4, (5,))
    out = mmfuse.LearningRates(nets, rates=[0.5, 3.0]).step(logits, labels, present=present)
    assert out.coefficients.tolist() == [0.5, 1.0]
    assert (nets["audio"].weight.grad == 0.5).all() and (nets["visual"].weight.grad == 1).all()
