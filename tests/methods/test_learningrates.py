"""A factor on each encoder's gradient, constant or by validation."""

from __future__ import annotations

import copy
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
    """It equals parameter groups with these rates over several steps, momentum included."""
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


def filled(*names: str) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor], torch.Tensor]:
    """Encoders whose gradients are 1, logits and labels."""
    nets = nets_of(*names)
    for net in nets.values():
        net.weight.grad, net.bias.grad = torch.ones(4, 3), torch.ones(4)
    return nets, {name: torch.randn(5, 4) for name in names}, torch.randint(0, 4, (5,))


@pytest.mark.parametrize("names", [("audio", "visual"), ("audio", "visual", "text")])
def test_rates_go_with_validation(cell: Cell, names: tuple[str, ...]) -> None:
    rates, told = [0.9, 1.1, 0.7][: len(names)], []
    nets, logits, labels = filled(*names)
    nets = {name: net.to(cell.device) for name, net in nets.items()}
    method = mmfuse.LearningRates(nets, rates=rates, window=3, backend=cell.backend)
    for epoch in range(6):
        for net in nets.values():
            net.weight.grad, net.bias.grad = torch.ones_like(net.weight), torch.ones_like(net.bias)
        method.set_epoch(epoch)
        out = method.step(
            {name: z.to(cell.device) for name, z in logits.items()}, labels.to(cell.device)
        )
        expected = list(rates)
        for m in range(len(names) if len(told) > 3 else 0):
            before = [scores[m] for scores in told[-4:-1]]
            expected[m] *= told[-1][m] / (sum(before) / 3)
        assert out.coefficients.tolist() == pytest.approx(expected, rel=1e-6)
        for c, net in zip(expected, nets.values(), strict=True):
            torch.testing.assert_close(net.weight.grad, torch.full_like(net.weight, c))
        told.append([0.2 + 0.1 * (epoch + 1) ** 0.5 * (m + 1) for m in range(len(names))])
        method.validated(dict(zip(names, told[-1], strict=True)))
    assert min(abs(c / rate - 1) for c, rate in zip(expected, rates, strict=True)) > 0.01


def test_validations_go_on_in_a_resumed_run() -> None:
    nets, logits, labels = filled("audio", "visual")
    first = mmfuse.LearningRates(nets, window=2)
    for score in (0.2, 0.3, 0.6):
        first.validated({"audio": score, "visual": torch.tensor(1 - score)})
    second = mmfuse.LearningRates(nets, window=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    want = [1.3 * 0.6 / 0.25, 0.7 * 0.4 / 0.75]
    assert second.step(logits, labels).coefficients.tolist() == pytest.approx(want, rel=1e-6)


def test_who_was_not_validated_has_its_own_rate() -> None:
    nets, logits, labels = filled("audio", "visual")
    method = mmfuse.LearningRates(nets, window=1)
    method.validated({"audio": 0.5, "visual": 0.5})
    method.validated({"audio": 0.7, "visual": math.nan})
    want = [1.3 * 0.7 / 0.5, 0.7]
    assert method.step(logits, labels).coefficients.tolist() == pytest.approx(want, rel=1e-6)


def test_the_factors_of_the_releases() -> None:
    """Accuracies of a training, and what their loops make of them, by hand."""
    nets, logits, labels = filled("audio", "visual")
    accuracies = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75]
    for window, wanted in {
        5: [1, 1, 1, 1, 1, 0.7 / 0.4, 0.75 / 0.5],
        1: [1, 0.3 / 0.2, 0.4 / 0.3, 0.5 / 0.4, 0.6 / 0.5, 0.7 / 0.6, 0.75 / 0.7],
    }.items():
        method = mmfuse.LearningRates(nets, rates=[1.0, 1.0], window=window)
        found = []
        for accuracy in accuracies:
            method.validated({"audio": accuracy, "visual": 0.5})
            for net in nets.values():
                net.weight.grad, net.bias.grad = torch.ones(4, 3), torch.ones(4)
            found.append(method.step(logits, labels).coefficients[0].item())
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("window", "scores", "error", "text"),
    [
        (None, {"audio": 0.5, "visual": 0.5}, RuntimeError, "constant rates; give window"),
        (2, {"audio": 0.5}, ValueError, "scores must name the modalities|visual"),
        (2, {"audio": 0.5, "visual": 0.0}, ValueError, r"scores\['visual'\] must be positive"),
        (2, {"audio": "0.5", "visual": 0.5}, TypeError, r"scores\['audio'\] must be a number"),
    ],
)
def test_bad_scores_change_nothing(
    window: int | None, scores: Any, error: type[Exception], text: str
) -> None:
    method = mmfuse.LearningRates(nets_of("audio", "visual"), window=window)
    before = copy.deepcopy(method.state_dict()["state"])
    with pytest.raises(error, match=text):
        method.validated(scores)
    for name, value in method.state_dict()["state"].items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (1.5, TypeError)])
def test_bad_windows(window: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="window must be"):
        mmfuse.LearningRates(nets_of("audio", "visual"), window=window)
