"""CGGM's formulas; the authors' numbers are in tests/golden."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

ROWS, CLASSES = 8, 3


def networks(count: int, device: str = "cpu") -> dict[str, nn.Module]:
    return {f"m{i}": nn.Linear(3, 4).to(device) for i in range(count)}


def fill(nets: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Gradients as after a backward pass, and copies of them."""
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    return {name: [p.grad.clone() for p in net.parameters()] for name, net in nets.items()}


def shown(right: list[int], labels: Tensor) -> dict[str, Tensor]:
    """Logits of which the first so many rows are right."""
    found = {}
    for m, count in enumerate(right):
        z = torch.randn(ROWS, CLASSES, device=labels.device)
        rows = torch.arange(ROWS, device=labels.device)
        z[rows, torch.where(rows < count, labels, (labels + 1) % CLASSES)] += 9
        found[f"m{m}"] = z
    return found


@pytest.mark.parametrize("made", [mmfuse.CGGM, mmfuse.CGGM.official])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_formula(cell: Cell, count: int, made: Any) -> None:
    nets = networks(count, cell.device)
    cggm = made(nets, rho=1.1, backend=cell.backend)
    before, bounded, turned = [0.0] * count, 0, 0
    for _ in range(25):
        right = torch.randint(0, ROWS + 1, (count,)).tolist()
        labels = torch.randint(0, CLASSES, (ROWS,), device=cell.device)
        grads = fill(nets)
        out = cggm.step(shown(right, labels), labels)
        e = [r / ROWS for r in right]
        change = [now - last for now, last in zip(e, before, strict=True)]
        k = [(sum(change) + 1e-8 - d) / (sum(change) + 1e-8) for d in change]
        if made is mmfuse.CGGM:
            bounded += sum(abs(x) > 2 for x in k)
            k = [min(max(x, -2.0), 2.0) for x in k]
        turned += sum(x < 0 for x in k)
        assert out.scores.tolist() == pytest.approx(e)
        assert out.progress.tolist() == pytest.approx(change, abs=1e-12)
        assert out.shares.tolist() == pytest.approx(k, rel=1e-7)
        assert out.coefficients.tolist() == pytest.approx([1.1 * x for x in k], rel=1e-7)
        for x, (name, net) in zip(k, nets.items(), strict=True):
            for p, g in zip(net.parameters(), grads[name], strict=True):
                torch.testing.assert_close(p.grad, 1.1 * x * g, rtol=1e-5, atol=1e-6)
        before = e
    assert turned and bool(bounded) == (made is mmfuse.CGGM)


@pytest.mark.parametrize("bound", [1.0, 2.0, None])
def test_progress_that_cancels_is_bounded(bound: float | None) -> None:
    nets, labels = networks(2), torch.zeros(ROWS, dtype=torch.int64)
    cggm = mmfuse.CGGM(nets, rho=1.0, bound=bound)
    for right in ([4, 4], [5, 3]):
        fill(nets)
        out = cggm.step(shown(right, labels), labels)
    first, second = out.coefficients.tolist()
    if bound is None:
        assert first < -1e7 and second > 1e7
    else:
        assert [first, second] == [-bound, bound]


@pytest.mark.parametrize("made", [mmfuse.CGGM, mmfuse.CGGM.official])
def test_who_gains_more_than_all_together_is_turned_around(made: Any) -> None:
    """The release does so, and its golden numbers have such steps; the default's bound does not."""
    nets, labels = networks(3), torch.zeros(ROWS, dtype=torch.int64)
    cggm = made(nets, rho=1.0)
    for right in ([2, 4, 4], [5, 3, 4]):  # +3, -1 and 0 of 8
        grads = fill(nets)
        out = cggm.step(shown(right, labels), labels)
    assert out.shares.tolist() == pytest.approx([-0.5, 1.5, 1.0], rel=1e-6)
    for k, (name, net) in zip([-0.5, 1.5, 1.0], nets.items(), strict=True):
        for p, g in zip(net.parameters(), grads[name], strict=True):
            torch.testing.assert_close(p.grad, k * g, rtol=1e-5, atol=1e-6)


def test_nothing_is_decided_where_nothing_changes() -> None:
    nets, labels = networks(3), torch.zeros(ROWS, dtype=torch.int64)
    cggm = mmfuse.CGGM(nets)
    logits = shown([5, 2, 7], labels)
    for _ in range(2):
        fill(nets)
        out = cggm.step(logits, labels)
    assert out.shares.tolist() == [1, 1, 1] and out.coefficients.tolist() == [1.3, 1.3, 1.3]


def test_of_equal_logits_the_first_counts_and_nan_is_wrong() -> None:
    nets = networks(2)
    fill(nets)
    labels = torch.tensor([0, 1, 1, -100])
    logits = {"m0": torch.zeros(4, 2), "m1": torch.zeros(4, 2)}
    logits["m1"][:, 1] = torch.tensor([0.0, torch.nan, 1.0, 1.0])
    out = mmfuse.CGGM(nets).step(logits, labels)
    assert out.scores.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_batch_without_labels_changes_nothing() -> None:
    nets = networks(2)
    cggm = mmfuse.CGGM(nets)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    fill(nets)
    cggm.step(shown([5, 2], labels), labels)
    state = copy.deepcopy(cggm.state_dict())
    grads = fill(nets)
    out = cggm.step(shown([1, 8], labels), torch.full((ROWS,), -100))
    assert out.coefficients.tolist() == [1, 1] and bool(out.shares.isnan().all())
    for name, net in nets.items():
        assert all(map(torch.equal, grads[name], (p.grad for p in net.parameters())))
    assert all(torch.equal(x, state["state"][n]) for n, x in cggm.state_dict()["state"].items())


def test_metrics_of_ones_own_with_one_missing() -> None:
    """A missing modality keeps its last metric, and takes part in no comparison."""
    nets = networks(3)
    cggm = mmfuse.CGGM(nets, rho=1.0, bound=None)
    steps = [(0.5, 0.25, 0.125), (0.75, 0.5, math.nan), (0.5, 0.75, 0.5)]
    found = []
    for scores in steps:
        fill(nets)
        found.append(cggm.step(scores=dict(zip(nets, scores, strict=True))))
    assert found[0].shares.tolist() == pytest.approx([3 / 7, 5 / 7, 6 / 7])
    assert found[1].shares[:2].tolist() == pytest.approx([0.5, 0.5])
    assert found[1].coefficients[2] == 1
    # The last metrics of pairs with the third are those of the first step.
    mine, others = (0 + -0.25) / 2, 0.25 + 0.375
    assert found[2].shares[0].item() == pytest.approx(others / (others + mine))


def output_layers(count: int) -> tuple[dict[str, Tensor], Tensor]:
    weights = {f"m{i}": torch.randn(CLASSES, 4, requires_grad=True) for i in range(count)}
    return weights, torch.randn(CLASSES, 4, requires_grad=True)


def plain_direction(k: Tensor, classifiers: dict[str, Tensor], output: Tensor) -> Tensor:
    """The loss by the paper's formula, for λ = 1."""
    total = torch.zeros((), dtype=torch.float64)
    for factor, w in zip(k.tolist(), classifiers.values(), strict=True):
        w, b = w.detach().double(), output.double()
        total = total + abs(factor) - factor * (w * b).sum() / (w.norm() * b.norm())
    return total / len(classifiers)


@pytest.mark.parametrize("made", [mmfuse.CGGM, mmfuse.CGGM.official])
@pytest.mark.parametrize("count", [2, 3])
def test_the_direction_loss(count: int, made: Any) -> None:
    """Its weights are those that are there, or those of the step before."""
    nets, labels = networks(count), torch.zeros(ROWS, dtype=torch.int64)
    cggm = made(nets)
    weights, output = output_layers(count)
    shares = torch.zeros(count)
    kept: Any = None
    for step in range(4):
        now = [copy.deepcopy(weights), output.detach().clone().requires_grad_()]
        at = now if made is mmfuse.CGGM or kept is None else kept
        want = 0.2 * plain_direction(shares, *at)
        (grad,) = torch.autograd.grad(want, at[1])
        found = cggm.direction_loss(weights, output)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
        found.backward()
        torch.testing.assert_close(output.grad, grad, rtol=1e-4, atol=1e-6)
        assert bool(output.grad.any()) == (step > 0)
        assert all(w.grad is None for w in weights.values())
        output.grad = None
        fill(nets)
        right = [(3 * step + 2 * m) % ROWS for m in range(count)]
        shares = cggm.step(shown(right, labels), labels).shares
        kept = now
        with torch.no_grad():
            for w in (*weights.values(), output):
                w.add_(torch.randn_like(w))


def test_there_is_no_direction_outside_of_the_epochs() -> None:
    nets, labels = networks(2), torch.zeros(ROWS, dtype=torch.int64)
    cggm = mmfuse.CGGM(nets, ends=0)
    weights, output = output_layers(2)
    for epoch in (0, 1):
        cggm.set_epoch(epoch)
        fill(nets)
        cggm.step(shown([5, 2 + epoch], labels), labels)
        assert bool(cggm.direction_loss(weights, output) == 0) == (epoch == 1)


def test_a_resumed_run_of_the_release_knows_the_weights_before() -> None:
    labels = torch.zeros(ROWS, dtype=torch.int64)
    runs = [mmfuse.CGGM.official(networks(2)) for _ in range(2)]
    weights, output = output_layers(2)
    runs[0].direction_loss(weights, output)
    fill({"a": nn.Linear(1, 1)})
    for p in runs[0].modalities.parameters:
        p.grad = torch.ones_like(p)
    runs[0].step(shown([5, 2], labels), labels)
    file = io.BytesIO()
    torch.save(runs[0].state_dict(), file)
    file.seek(0)
    runs[1].load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        output.add_(1)
    first, second = (run.direction_loss(weights, output) for run in runs)
    assert torch.equal(first, second) and bool(first != 0)
    assert "weights" not in mmfuse.CGGM(networks(2)).state_dict()


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "names": ({"m0": torch.ones(2, 2)}, torch.ones(2, 2), ValueError, "missing"),
    "no mapping": ([torch.ones(2, 2)] * 2, torch.ones(2, 2), TypeError, "classifier_weights must"),
    "shape": (
        {"m0": torch.ones(2, 2), "m1": torch.ones(2, 3)},
        torch.ones(2, 2),
        ValueError,
        r"classifier_weights\['m1'\] must have the shape of output_weight, \[2, 2\], got \[2, 3\]",
    ),
    "dtype": (
        {"m0": torch.ones(2, 2), "m1": torch.ones(2, 2, dtype=torch.int64)},
        torch.ones(2, 2),
        TypeError,
        r"classifier_weights\['m1'\] must be a floating tensor, got torch.int64",
    ),
    "output": (
        {"m0": torch.ones(2, 2), "m1": torch.ones(2, 2)},
        nn.Linear(2, 2),
        TypeError,
        "output_weight must be a floating tensor, got Linear",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_named(name: str) -> None:
    weights, output, error, message = WRONG[name]
    cggm = mmfuse.CGGM.official(networks(2))
    with pytest.raises(error, match=message):
        cggm.direction_loss(weights, output)
    assert "weights" not in cggm.state_dict()


@pytest.mark.parametrize(
    ("option", "value"),
    [("rho", 0.0), ("rho", math.inf), ("rho", -1.0), ("bound", 0.5), ("bound", math.nan)],
)
def test_bad_options(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        mmfuse.CGGM(networks(2), **{option: value})


def test_classifiers_that_learn_with_the_rest_of_the_step() -> None:
    """The docstring's loop, with the encoders out of the classifiers' reach."""
    torch.manual_seed(0)
    nets = networks(2)
    heads = {name: nn.Linear(4, CLASSES) for name in nets}
    fusion = nn.Linear(4, CLASSES)
    cggm = mmfuse.CGGM(nets)
    labels = torch.randint(0, CLASSES, (ROWS,))
    for step in range(3):
        for net in nets.values():
            net.zero_grad()
        features = {name: net(torch.randn(ROWS, 3)) for name, net in nets.items()}
        logits = {name: heads[name](f.detach()) for name, f in features.items()}
        sum(mmfuse.unimodal_losses(logits, labels).values()).backward()
        assert step or all(p.grad is None for net in nets.values() for p in net.parameters())
        loss = F.cross_entropy(fusion(sum(features.values())), labels)
        loss = loss + cggm.direction_loss({n: h.weight for n, h in heads.items()}, fusion.weight)
        out = cggm.backward(loss, logits, labels)
        assert bool(out.finite)
