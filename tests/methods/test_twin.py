"""Twin's formula; the authors' numbers are in tests/golden."""

from __future__ import annotations

import math

import pytest
import torch
from cells import Cell
from torch import nn

import mmfuse


@pytest.mark.parametrize("beta", [2.0, 10.0, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_formula(cell: Cell, count: int, beta: float) -> None:
    nets = {f"m{i}": nn.Linear(3, 4).to(cell.device) for i in range(count)}
    labels = torch.randint(0, 4, (9,), device=cell.device)
    logits = {
        name: (i + 1) * net(torch.randn(9, 3, device=cell.device))
        for i, (name, net) in enumerate(nets.items())
    }
    sum(z.square().sum() for z in logits.values()).backward()
    before = {name: [p.grad.clone() for p in net.parameters()] for name, net in nets.items()}
    twin = mmfuse.Twin(nets, alpha=0.7, beta=beta, backend=cell.backend)
    out = twin.step(logits, labels)
    s = [float(z.softmax(1).gather(1, labels[:, None]).mean().detach()) for z in logits.values()]
    for m, (name, net) in enumerate(nets.items()):
        ratio = sum(s[:m] + s[m + 1 :]) / (count - 1) / s[m]
        change = math.tanh(0.7 * (ratio - 1))
        k = 1 + ((beta - 1) * change if ratio > 1 else change)
        torch.testing.assert_close(float(out.ratios[m]), ratio, rtol=1e-5, atol=0)
        torch.testing.assert_close(float(out.coefficients[m]), k, rtol=1e-5, atol=1e-6)
        for p, g in zip(net.parameters(), before[name], strict=True):
            torch.testing.assert_close(p.grad, k * g, rtol=1e-5, atol=1e-6)
    assert out.finite and out.scores.tolist() == pytest.approx(s, rel=1e-5)


def test_a_score_that_is_no_number_changes_nothing() -> None:
    nets = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    sum(net(torch.ones(1, 2)).sum() for net in nets.values()).backward()
    before = [p.grad.clone() for net in nets.values() for p in net.parameters()]
    nothing = torch.full((1,), -100)
    out = mmfuse.Twin(nets).step({name: torch.ones(1, 2) for name in nets}, nothing)
    assert out.coefficients.tolist() == [1.0, 1.0]
    assert all(map(torch.equal, before, (p.grad for n in nets.values() for p in n.parameters())))


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_bad_options(name: str, value: float) -> None:
    nets = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
        mmfuse.Twin(nets, **{name: value})


def test_official_ends_with_epoch_1500() -> None:
    made = mmfuse.Twin.official({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, ends=7)
    assert (made.starts, made.ends) == (0, 7)
    made = mmfuse.Twin.official({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert (made.starts, made.ends) == (0, 1500)
