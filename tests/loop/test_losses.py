"""Unimodal losses: PyTorch's, one for each modality, over the samples that have it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

NAMES = ("audio", "visual", "text")
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])


def logits_of(*shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, requires_grad=True) for name in NAMES}


def case(kind: str) -> tuple[dict[str, Tensor], Tensor, nn.Module]:
    """Logits, labels and a loss that has everything that PyTorch's has."""
    if kind == "classes":
        labels = torch.randint(0, 4, (9,))
        labels[2] = 3  # ignored
        loss: nn.Module = nn.CrossEntropyLoss(WEIGHT, ignore_index=3, label_smoothing=0.1)
        return logits_of(9, 4), labels, loss
    if kind == "pixels":
        return logits_of(9, 4, 3, 2), torch.randint(0, 4, (9, 3, 2)), nn.CrossEntropyLoss()
    if kind == "soft":
        return logits_of(9, 4), torch.rand(9, 4).softmax(1), nn.CrossEntropyLoss(WEIGHT)
    assert kind == "labels"
    y = (torch.rand(9, 4) > 0.7).float()
    return logits_of(9, 4), y, nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT + 1)


KINDS = ["classes", "pixels", "soft", "labels"]


def gradients(losses: dict[str, Tensor], logits: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(losses.values()), list(logits.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_criterions(kind: str) -> None:
    logits, labels, loss = case(kind)
    found = mmfuse.unimodal_losses(logits, labels, criterion=loss)
    assert list(found) == list(NAMES)
    expected = {name: loss(z, labels) for name, z in logits.items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(found, logits), gradients(expected, logits))


def test_the_default_is_cross_entropy() -> None:
    logits, labels = logits_of(5, 3), torch.randint(0, 3, (5,))
    found = mmfuse.unimodal_losses(logits, labels)
    assert found == {name: F.cross_entropy(z, labels) for name, z in logits.items()}


def test_any_callable_may_make_them() -> None:
    logits, target = logits_of(6, 1), torch.randn(6, 1)
    found = mmfuse.unimodal_losses(logits, target, criterion=F.l1_loss)
    assert found == {name: F.l1_loss(z, target) for name, z in logits.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_missing_samples_are_left_out(kind: str, reduction: str) -> None:
    """Each modality has a batch of its own, as it were; missing entries may even be NaN."""
    logits, labels, loss = case(kind)
    loss.reduction = reduction
    present = {name: torch.rand(9) > 0.4 for name in NAMES}
    with torch.no_grad():
        for name, z in logits.items():
            z[~present[name]] = torch.nan
    found = mmfuse.unimodal_losses(logits, labels, criterion=loss, present=present)
    expected = {name: loss(z[present[name]], labels[present[name]]) for name, z in logits.items()}
    torch.testing.assert_close(found, expected)
    grads = gradients(found, logits)
    torch.testing.assert_close(grads, gradients(expected, logits))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_modality_that_nobody_has_has_no_loss(kind: str) -> None:
    logits, labels, loss = case(kind)
    present = dict.fromkeys(NAMES, torch.ones(9, dtype=torch.bool))
    present["visual"] = torch.zeros(9, dtype=torch.bool)
    found = mmfuse.unimodal_losses(logits, labels, criterion=loss, present=present)
    assert found["visual"] == 0
    _, visual, _ = gradients(found, logits)
    assert (visual == 0).all()


def test_weights() -> None:
    logits, labels = logits_of(5, 3), torch.randint(0, 3, (5,))
    plain = mmfuse.unimodal_losses(logits, labels)
    half = mmfuse.unimodal_losses(logits, labels, weights=0.5)
    torch.testing.assert_close(half, {name: loss / 2 for name, loss in plain.items()})
    each = {"text": 3.0, "audio": 0.0, "visual": torch.tensor(2.0)}
    found = mmfuse.unimodal_losses(logits, labels, weights=each)
    torch.testing.assert_close(found, {name: each[name] * loss for name, loss in plain.items()})


def test_second_derivatives_are_pytorchs() -> None:
    logits, labels = logits_of(5, 3), torch.randint(0, 3, (5,))

    def penalty(losses: dict[str, Tensor]) -> Tensor:
        grads = torch.autograd.grad(sum(losses.values()), list(logits.values()), create_graph=True)
        return sum(g.square().sum() for g in grads)

    plain = {name: F.cross_entropy(z, labels) for name, z in logits.items()}
    every = {"present": dict.fromkeys(NAMES, torch.ones(5, dtype=torch.bool))}
    for more in ({}, every):
        found = penalty(mmfuse.unimodal_losses(logits, labels, **more))
        expected = penalty(plain)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, list(logits.values())),
            torch.autograd.grad(expected, list(logits.values()), retain_graph=True),
        )


def test_no_graph_break() -> None:
    logits, labels = logits_of(5, 3), torch.randint(0, 3, (5,))
    present = {name: torch.rand(5) > 0.5 for name in NAMES}
    fast = torch.compile(mmfuse.unimodal_losses, fullgraph=True, backend="aot_eager")
    found = fast(logits, labels, present=present)
    torch.testing.assert_close(found, mmfuse.unimodal_losses(logits, labels, present=present))


Z = {"audio": torch.zeros(2, 3), "visual": torch.zeros(2, 3)}
Y = torch.zeros(2, dtype=torch.int64)
MASKS = dict.fromkeys(Z, torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("logits", "labels", "more", "error", "text"),
    [
        ([], Y, {}, TypeError, "logits must map names to tensors, got list"),
        ({}, Y, {}, ValueError, "logits must hold at least one modality"),
        ({"audio": 1}, Y, {}, TypeError, r"logits\['audio'\] is not a tensor but int"),
        (Z, [0, 0], {}, TypeError, "labels must be a tensor, got list"),
        (Z, Y, {"criterion": "ce"}, TypeError, "criterion must be a loss .* got str"),
        (Z, Y, {"weights": -1.0}, ValueError, "weights must be a finite number of at least 0"),
        (Z, Y, {"weights": math.inf}, ValueError, "weights must be a finite number"),
        (Z, Y, {"weights": {"audio": 1.0}}, ValueError, "weights must name the modalities"),
        (Z, Y, {"weights": {"audio": "1", "visual": 1}}, TypeError, r"weights\['audio'\] must be"),
        (Z, Y, {"criterion": F.mse_loss, "present": MASKS}, TypeError, "present goes with nn.Cros"),
        (Z, Y, {"present": {"audio": MASKS["audio"]}}, ValueError, "missing .'visual'"),
        (Z, Y, {"present": dict.fromkeys(Z, Y)}, TypeError, r"present\['audio'\] must be a bool"),
        (Z, Y + 100, {}, ValueError, r"fails on logits\['audio'\] and labels: Target 100 is"),
        (Z, Y[:1], {}, ValueError, r"fails on logits\['audio'\] and labels"),
        (Z | {"visual": Z["visual"].long()}, Y, {}, TypeError, r"fails on logits\['visual'\]"),
        (Z, Y, {"criterion": nn.Identity()}, TypeError, "the criterion fails on"),
        (Z, Y[0], {"present": MASKS}, ValueError, "labels must have one entry for each sample"),
        (Z | {"audio": torch.zeros(6)}, Y, {"present": MASKS}, ValueError, r"logits\['audio'\]"),
        (
            Z,
            Y,
            {"criterion": nn.CrossEntropyLoss(reduction="none")},
            ValueError,
            r"criterion must make a 0-d loss of logits\['audio'\], got shape \[2\]",
        ),
    ],
)
def test_bad_arguments(
    logits: Any, labels: Any, more: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        mmfuse.unimodal_losses(logits, labels, **more)
