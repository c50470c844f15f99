"""Outputs as PyTorch's losses take them, with every method that looks at logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from balancing import CONSTANT, IN_FORWARD, KINDS, NEEDS, STEPPING, arguments, make, start
from torch import Tensor, nn

from mmfuse import METHODS, NoiseStream

ROWS, CLASSES = 8, 3
BCE = nn.BCEWithLogitsLoss()


class Task(NamedTuple):
    """Logits of a shape, their targets, the loss, and how both are flattened to samples."""

    shape: tuple[int, ...]
    labels: Tensor
    criterion: Any
    flat: str


def _one_of(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(CLASSES).view(shape)


_SOFT = torch.linspace(0, 3, ROWS * CLASSES).view(ROWS, CLASSES).sin().abs().softmax(1)
_WEIGHT = torch.tensor([0.5, 1.0, 2.0])
TASKS = {
    "classes": Task((ROWS, CLASSES), _one_of(ROWS), None, "as it is"),
    "tokens": Task((ROWS, CLASSES, 5), _one_of(ROWS, 5), None, "places"),
    "segmentation": Task(
        (ROWS, CLASSES, 4, 2),
        _one_of(ROWS, 4, 2).index_fill(1, torch.tensor([0]), 255),
        nn.CrossEntropyLoss(_WEIGHT, ignore_index=255),
        "places",
    ),
    "soft labels": Task((ROWS, CLASSES), _SOFT, None, "as it is"),
    "smoothing": Task(
        (ROWS, CLASSES), _one_of(ROWS), nn.CrossEntropyLoss(label_smoothing=0.1), "as it is"
    ),
    "tags": Task(
        (ROWS, CLASSES), _SOFT.round(), nn.BCEWithLogitsLoss(pos_weight=_WEIGHT), "as it is"
    ),
    "tags of places": Task(
        (ROWS, CLASSES, 5), _one_of(ROWS, CLASSES, 5).clamp(max=1.0), BCE, "tags"
    ),
    "yes or no": Task((ROWS, 1), _one_of(ROWS, 1).clamp(max=1.0), BCE, "as it is"),
    "a single logit": Task((ROWS,), _one_of(ROWS).clamp(max=1.0), BCE, "column"),
}
#: Methods that look at logits.
LOOKING = [kind for kind in KINDS if "logits" in METHODS[KINDS[kind].method].card.needs]


def flattened(how: str, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same scores, of [B, C] logits."""
    if how == "places":
        return z.movedim(1, -1).reshape(-1, CLASSES), labels.flatten()
    if how == "tags":
        return z.movedim(1, -1).reshape(-1, CLASSES), labels.movedim(1, -1).reshape(-1, CLASSES)
    return (z.unsqueeze(1), labels.unsqueeze(1)) if how == "column" else (z, labels)


def stepped(kind: str, task: Task, flat: bool) -> tuple[Any, list[Tensor]]:
    """The result of a step, and the gradients of what it passes on or of the encoders."""
    torch.manual_seed(0)
    names = ("audio", "visual")
    encoders = {n: nn.Linear(4, 6).double() for n in names}
    inputs = {n: torch.randn(ROWS, 4).double() for n in names}
    features = {n: encoders[n](x) for n, x in inputs.items()}
    labels = task.labels
    logits = {n: (2 - m) * torch.randn(task.shape).double() for m, n in enumerate(names)}
    if labels.is_floating_point():
        logits["audio"] += (2 * labels - 1).view(task.shape)
    else:
        classes = torch.arange(CLASSES).view(-1, *[1] * (labels.dim() - 1))
        logits["audio"] += 2.0 * (classes == labels.unsqueeze(1))
    fused = sum(logits.values()) / 2
    if flat:
        fused = flattened(task.flat, fused, labels)[0]
        both = {n: flattened(task.flat, z, labels) for n, z in logits.items()}
        logits, labels = {n: z for n, (z, _) in both.items()}, both["audio"][1]
    for z in logits.values():
        z.requires_grad_()
    options: dict[str, Any] = {} if task.criterion is None else {"criterion": task.criterion}
    if KINDS[kind].method == "MCR":  # a contrast is of classes of samples
        options |= {"contrast": 0.0, "permutations": 2}
    if task.criterion is not None and task.criterion.weight is not None:
        options["criterion"] = nn.CrossEntropyLoss(_WEIGHT.double(), ignore_index=255)
    method = make(kind, encoders, stream=NoiseStream(3), **options)
    start(method)
    seen = {"logits": logits, "labels": labels, "features": features, "inputs": inputs}
    seen |= {"fused": sum(features.values()), "fused_logits": fused}
    given = arguments(method, seen)
    for encoder in encoders.values():
        for p in encoder.parameters():
            p.grad = torch.ones_like(p)
    if kind not in IN_FORWARD:
        out = method.step(**given)
        return out, [p.grad for e in encoders.values() for p in e.parameters()]
    out = method(**given)
    passed = [getattr(out, "loss", torch.zeros(()))]
    for values in (getattr(out, "features", {}), getattr(out, "logits", {})):
        passed += [x.square().sum() for x in values.values()]
    total = sum(passed)
    wrt = [*features.values(), *logits.values()]
    return out, list(torch.autograd.grad(total, wrt, materialize_grads=True))


@pytest.mark.parametrize("kind", LOOKING)
@pytest.mark.parametrize("task", TASKS)
def test_any_outputs(task: str, kind: str) -> None:
    """A method that scores decides as it does from the places one by one, if it can be told so."""
    out, grads = stepped(kind, TASKS[task], flat=False)
    assert all(bool(g.isfinite().all()) for g in grads)
    for name in ("coefficients", "scores", "ratios", "loss"):
        value = getattr(out, name, None)
        assert value is None or bool(value.isfinite().all()), name
    if kind in STEPPING and METHODS[KINDS[kind].method].card.needs == ("logits",):
        want, expected = stepped(kind, TASKS[task], flat=True)
        torch.testing.assert_close(out.scores, want.scores)
        torch.testing.assert_close(out.coefficients, want.coefficients)
        torch.testing.assert_close(grads, expected)
        assert kind in CONSTANT or (out.coefficients != NEEDS[kind].neutral).any()
    if kind in IN_FORWARD:
        assert any(bool(g.any()) for g in grads)
