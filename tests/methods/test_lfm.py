"""LFM's formulas, its weights over epochs, and its errors; golden numbers are elsewhere."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse
from mmfuse.methods._lfm_weights import label_weight

NAMES = ("audio", "visual", "text")


def batch(count: int, device: Any = "cpu", rows: int = 7) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(count)
    logits = {name: 2 * torch.randn(rows, 4, device=device) for name in NAMES[:count]}
    return logits, torch.randint(0, 4, (rows,), device=device)


def gap(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's divergence of the mean from both."""
    p, q = a.softmax(1), b.softmax(1)
    mean = (p + q) / 2
    return (
        F.kl_div(p.log(), mean, reduction="batchmean")
        + F.kl_div(q.log(), mean, reduction="batchmean")
    ) / 2


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("epoch", [0, 60, 199])
def test_the_formula(cell: Cell, count: int, epoch: int) -> None:
    logits, labels = batch(count, cell.device)
    for z in logits.values():
        z.requires_grad_()
    lfm = mmfuse.LFM(num_modalities=count, backend=cell.backend).to(cell.device)
    lfm.set_epoch(epoch)
    out = lfm(logits, labels)
    found = torch.autograd.grad(out.loss, list(logits.values()))
    joint = sum(logits.values()) / count
    pairs = [gap(a, b) for a, b in combinations(logits.values(), 2)]
    first = label_weight(epoch)
    alignment = sum(pairs) / len(pairs)
    expected = 2 * (first * F.cross_entropy(joint, labels) + (1 - first) * alignment)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.joint, joint)
    torch.testing.assert_close(out.alignment, alignment.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        out.coefficients.double().cpu(), torch.tensor([first, 1 - first], dtype=torch.float64)
    )
    grads = torch.autograd.grad(expected, list(logits.values()))
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)
    assert all(bool(g.abs().sum() > 0) for g in found)


def test_the_schedule_is_spread_over_the_epochs_and_stops_at_0_and_1() -> None:
    logits, labels = batch(2)
    lfm, released = mmfuse.LFM(epochs=100), mmfuse.LFM.official(epochs=100)
    weights = []
    for epoch in range(100):
        lfm.set_epoch(epoch)
        released.set_epoch(epoch)
        out, of_release = lfm(logits, labels).coefficients, released(logits, labels).coefficients
        assert float(of_release[0]) == pytest.approx(label_weight(2 * epoch), rel=1e-6)
        torch.testing.assert_close(out, of_release.clamp(0, 1))
        weights.append(float(of_release[0]))
    assert max(weights) > 1 and weights[0] < 0.21


def test_weights_are_not_rounded_to_the_logits() -> None:
    lfm = mmfuse.LFM(epochs=200)
    lfm.set_epoch(160)
    logits = {name: torch.randn(6, 4).bfloat16() for name in ("audio", "visual")}
    out = lfm(logits, torch.randint(0, 4, (6,)))
    torch.testing.assert_close(out.coefficients, lfm.weights.float())
    assert out.coefficients.bfloat16().float().tolist() != out.coefficients.tolist()


@pytest.mark.parametrize("made", [mmfuse.LFM, mmfuse.LFM.official])
def test_after_its_epochs_it_keeps_the_last_weights(made: Any) -> None:
    """The curve falls below 0 there: the labels were unlearned."""
    logits, labels = batch(2)
    lfm = made(epochs=100)
    lfm.set_epoch(99)
    last = lfm(logits, labels).coefficients
    for epoch in (100, 115, 1000):
        lfm.set_epoch(epoch)
        assert torch.equal(lfm(logits, labels).coefficients, last)
    assert 0.9 < float(last[0]) < 1.1


def test_without_weight_on_the_alignment_it_is_twice_the_joint_loss() -> None:
    logits, labels = batch(2)
    lfm = mmfuse.LFM(starts=3)
    lfm.set_epoch(2)
    out = lfm(logits, labels)
    joint = F.cross_entropy(sum(logits.values()) / 2, labels)
    torch.testing.assert_close(out.loss, 2 * joint)
    assert out.coefficients.tolist() == [1.0, 0.0] and out.alignment > 0
    lfm.set_epoch(3)
    assert lfm(logits, labels).coefficients[1] > 0


def test_predictions_that_agree_have_no_gap() -> None:
    z = torch.randn(5, 3, requires_grad=True)
    lfm = mmfuse.LFM()
    lfm.set_epoch(0)
    out = lfm({"audio": z, "visual": z}, torch.zeros(5, dtype=torch.int64))
    assert out.alignment == 0


def test_the_joint_loss_is_the_criterions() -> None:
    logits, labels = batch(2)
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1)
    out = mmfuse.LFM(criterion=criterion)(logits, labels)
    torch.testing.assert_close(out.cross_entropy, criterion(sum(logits.values()) / 2, labels))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoders = nn.ModuleDict({n: nn.Linear(3, 4).double() for n in ("audio", "visual")})
        self.heads = nn.ModuleDict({n: nn.Linear(4, 3).double() for n in ("audio", "visual")})

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.heads[n](self.encoders[n](x[n]).tanh()) for n in x}


def test_learning_is_a_difference_of_gradients_of_the_alignment() -> None:
    """H times a direction, by central differences of the gradient along it."""
    net, lfm = Net(), mmfuse.LFM(weighting="learned", rate=50.0)
    x = {n: torch.randn(6, 3, dtype=torch.float64) for n in ("audio", "visual")}
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    parameters = list(net.parameters())

    def losses() -> tuple[Tensor, Tensor]:
        z = list(net(x).values())
        return F.cross_entropy((z[0] + z[1]) / 2, labels), gap(*z)

    direction = torch.autograd.grad(losses()[0], parameters)
    ends = []
    small = 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=sign * small)
        label_loss, alignment = losses()
        total = 0.5 * label_loss + 0.5 * alignment
        ends.append(torch.autograd.grad(total, parameters[:1])[0])
        with torch.no_grad():
            torch._foreach_sub_(parameters, direction, alpha=sign * small)
    h = (ends[0] - ends[1]) / (2 * small)
    lfm.set_epoch(0)
    lfm.weights.fill_(0.5)
    lfm.learn(net(x), labels, parameters)
    expected = min(max(0.5 - 50 * float(h.mean()), 0.05), 0.95)
    assert 0.05 < expected < 0.95 and expected != 0.5
    assert float(lfm.weights[1]) == pytest.approx(expected, abs=1e-8)
    assert float(lfm.weights.sum()) == pytest.approx(1)
    assert all(p.grad is None for p in parameters)


def test_the_rate_halves_every_twenty_epochs_and_a_state_keeps_it() -> None:
    lfm = mmfuse.LFM(weighting="learned", rate=8.0)
    rates = []
    for epoch in (0, 19, 20, 20, 21, 40):
        lfm.set_epoch(epoch)
        rates.append(float(lfm.learning_rate))
    assert rates == [8.0, 8.0, 4.0, 4.0, 4.0, 2.0]
    again = mmfuse.LFM(weighting="learned", rate=8.0)
    again.load_state_dict(lfm.state_dict())
    again.set_epoch(40)
    assert float(again.learning_rate) == 2.0
    lfm.reset_parameters()
    assert lfm.weights.tolist() == [0.05, 0.95] and float(lfm.learning_rate) == 8.0


LOGITS, LABELS = batch(2)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "text"),
    [
        (LOGITS, None, TypeError, "LFM needs labels, a tensor"),
        ([1], LABELS, TypeError, "logits must map names to tensors, got list"),
        ({"audio": LOGITS["audio"]}, LABELS, ValueError, r"num_modalities=2, but logits has"),
        ({**LOGITS, "visual": 1}, LABELS, TypeError, r"logits\['visual'\] must be a floating"),
        ({**LOGITS, "visual": LABELS}, LABELS, TypeError, r"logits\['visual'\] .* torch.int64"),
        (
            {**LOGITS, "visual": torch.zeros(7, 5)},
            LABELS,
            ValueError,
            r"logits\['visual'\] must be .* like logits\['audio'\] \[7, 4\], got \[7, 5\]",
        ),
    ],
)
def test_bad_batches(logits: Any, labels: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.LFM()(logits, labels)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weighting": "guess"}, ValueError, "weighting must be 'schedule' or 'learned'"),
        ({"rate": -1.0}, ValueError, "rate must be a finite number of at least 0"),
        ({"rate": math.nan}, ValueError, "rate must be a finite number"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
        ({"criterion": nn.MSELoss()}, TypeError, "criterion must be nn.CrossEntropyLoss"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.LFM(**options)


def test_learning_has_to_be_asked_for() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match='LFM learns its weights with weighting="learned" only'):
        mmfuse.LFM().learn(LOGITS, LABELS, list(net.parameters()))
    learned = mmfuse.LFM(weighting="learned")
    with pytest.raises(RuntimeError, match="call set_epoch"):
        learned.learn(LOGITS, LABELS, list(net.parameters()))
    learned.set_epoch(0)
    with pytest.raises(ValueError, match="parameters must hold at least one tensor"):
        learned.learn(LOGITS, LABELS, [])
