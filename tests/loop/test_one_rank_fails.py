"""A batch that is wrong on one rank only: every rank raises, at once, and can go on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from balancing import (
    FIXED,
    KINDS,
    LOOKING,
    STEPPING,
    TWO_GRADIENTS,
    Shown,
    arguments,
    balance,
    make,
    see,
    show,
    start,
)
from networks import AudioVisual
from parallel import CLASSES, counted
from ranks import ranks
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

Fault = Callable[[AudioVisual, dict[str, Any]], None]
#: Far more than a step takes, and far less than gloo's timeout.
SOON = 30.0


def impossible_label(model: AudioVisual, seen: dict[str, Any]) -> None:
    seen["labels"] = seen["labels"].clone()
    seen["labels"][1] = CLASSES + 3


def other_names(model: AudioVisual, seen: dict[str, Any]) -> None:
    seen["logits"] = {"sound": seen["logits"]["audio"], "visual": seen["logits"]["visual"]}


def no_logits_tensor(model: AudioVisual, seen: dict[str, Any]) -> None:
    seen["logits"] = {name: z.tolist() for name, z in seen["logits"].items()}


def no_gradient(model: AudioVisual, seen: dict[str, Any]) -> None:
    for parameter in model.audio_net.parameters():
        parameter.grad = None


FAULTS: dict[str, tuple[Fault, str]] = {
    "an impossible label": (impossible_label, r"labels\[1\] = 8 is out of range"),
    "other names": (other_names, "name different modalities"),
    "no tensors": (no_logits_tensor, "TypeError|got list"),
    "no gradient": (no_gradient, "no parameter of the encoder of 'audio' has a gradient"),
}


class Trainer:
    """One rank's model and method, and a step of them."""

    def __init__(self, kind: str, rank: int) -> None:
        torch.manual_seed(3)
        self.model = AudioVisual().double()
        self.wrapped = DistributedDataParallel(self.model)
        torch.manual_seed(10 + rank)
        self.method = make(kind, self.model.encoders)
        if isinstance(self.method, torch.nn.Module):
            self.method.double()
        start(self.method)

    def forward(self) -> tuple[dict[str, Any], Any]:
        labels = torch.randint(0, CLASSES, (6,))
        audio = torch.randn(6, 1, 9, 8, dtype=torch.float64)
        visual = torch.randn(6, 3, 7, 7, dtype=torch.float64)
        a, v, _ = self.wrapped(audio, visual)
        inputs = {"audio": audio, "visual": visual}
        return see(self.model.fc, {"audio": a, "visual": v}, inputs, labels), labels

    def step(self, fault: Fault | None = None) -> Any:
        """Forward and backward pass, in which all ranks take part, then the method's step."""
        for parameter in self.model.parameters():
            parameter.grad = None
        seen, _ = self.forward()
        if isinstance(self.method, torch.nn.Module):
            if fault is not None:
                fault(self.model, seen)
            return balance(self.method, show(self.method, self.model.fc, seen))
        shown = show(self.method, self.model.fc, seen)

        def between() -> dict[str, Any]:
            if fault is not None:
                fault(self.model, seen)
            return {}

        return balance(self.method, Shown(*shown[:2], seen), between=between)


def error_of(action: Callable[[], Any]) -> tuple[str, float]:
    """The type and text of what it raises, and how long that took; no text if it raises nothing."""
    begun = time.monotonic()
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begun
    return "", time.monotonic() - begun


def one_fails(rank: int, kind: str, name: str, good_steps: int) -> dict[str, Any]:
    trainer = Trainer(kind, rank)
    for _ in range(good_steps):
        trainer.step()
    fault = FAULTS[name][0] if rank == 1 else None
    return failed_once(trainer, lambda: trainer.step(fault))


def check(found: list[dict[str, Any]], message: str) -> None:

    own, others = found[1]["text"], [f["text"] for f in found if f is not found[1]]
    assert re.search(message, own) and "cannot take this step" not in own
    for text in others:
        assert text.startswith("RuntimeError: rank 1 cannot take this step")
        assert own in text  # the culprit's words
    assert max(f["seconds"] for f in found) < SOON
    # The step after is one in which all take part again.
    for other in found[1:]:
        torch.testing.assert_close(other["small"], found[0]["small"], rtol=0, atol=0)
        torch.testing.assert_close(other["grads"], found[0]["grads"], rtol=0, atol=0)


SENSING = [*STEPPING, *LOOKING]


@pytest.mark.parametrize("good_steps", [0, 2], ids=["first step", "later"])
@pytest.mark.parametrize("kind", SENSING)
def test_every_rank_raises_what_one_has_found(kind: str, good_steps: int) -> None:
    name = "an impossible label"
    check(ranks(2).run(one_fails, kind, name, good_steps), FAULTS[name][1])


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "an impossible label"])
@pytest.mark.parametrize("kind", ["OGM-GE", "RedReg"])
def test_every_kind_of_fault_travels(kind: str, name: str) -> None:
    check(ranks(2).run(one_fails, kind, name, 0), FAULTS[name][1])


def failed_once(trainer: Trainer, step: Callable[[], Any]) -> dict[str, Any]:
    """The error of a step, and what the step after it does."""
    text, seconds = error_of(step)
    out = trainer.step()
    return {
        "text": text,
        "seconds": seconds,
        "small": out.scores if isinstance(trainer.method, torch.nn.Module) else out.coefficients,
        "grads": [p.grad for p in trainer.model.parameters()],
    }


def fails_while_observing(rank: int, kind: str) -> dict[str, Any]:
    """The fault is in the first of two micro-batches, before the others' backward pass."""
    trainer = Trainer(kind, rank)

    def step() -> None:
        with trainer.wrapped.no_sync():
            seen, _ = trainer.forward()
            shown = show(trainer.method, trainer.model.fc, seen)
            shown.loss.backward()
        if rank == 1:
            impossible_label(trainer.model, seen)
        trainer.method.observe(**arguments(trainer.method, seen))
        seen, _ = trainer.forward()
        shown = show(trainer.method, trainer.model.fc, seen)
        shown.loss.backward()  # reduces the gradients of all ranks
        trainer.method.step(**arguments(trainer.method, seen))

    return failed_once(trainer, step)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_fault_while_observing_is_raised_by_the_step(kind: str) -> None:
    check(ranks(2).run(fails_while_observing, kind), FAULTS["an impossible label"][1])


def fails_in_backward(rank: int, kind: str) -> dict[str, Any]:
    """`backward` looks at the logits before the backward pass, in which all ranks take part."""
    trainer = Trainer(kind, rank)

    def step() -> None:
        seen, _ = trainer.forward()
        loss = show(trainer.method, trainer.model.fc, seen).loss
        if rank == 1:
            impossible_label(trainer.model, seen)
        trainer.method.backward(loss, **arguments(trainer.method, seen))

    return failed_once(trainer, step)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_fault_in_backward_does_not_keep_the_others_waiting(kind: str) -> None:
    check(ranks(2).run(fails_in_backward, kind), FAULTS["an impossible label"][1])


def nothing_observed(rank: int, kind: str, everywhere: bool) -> dict[str, Any]:
    """One rank's step comes without anything, or that of all."""
    trainer = Trainer(kind, rank)

    def step() -> None:
        seen, _ = trainer.forward()
        show(trainer.method, trainer.model.fc, seen).loss.backward()
        some = {} if everywhere or rank == 1 else arguments(trainer.method, seen)
        trainer.method.step(**some)

    return failed_once(trainer, step)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_step_without_anything_does_not_keep_the_others_waiting(kind: str) -> None:
    check(ranks(2).run(nothing_observed, kind, False), "nothing was observed since the last step")


def test_a_step_without_anything_on_all_ranks() -> None:
    for found in ranks(2).run(nothing_observed, "OGM", True):
        assert found["text"].startswith("RuntimeError: OGM.step: nothing was observed")


def width_and_sizes(rank: int, kind: str) -> tuple[int, list[int]]:
    trainer = Trainer(kind, rank)
    with counted(dist) as sizes:
        trainer.step()
    return trainer.method._senses._width(), list(sizes)


@pytest.mark.parametrize("kind", STEPPING)
def test_a_rule_knows_how_much_it_sends(kind: str) -> None:
    for width, sizes in ranks(2).run(width_and_sizes, kind):
        assert sizes == [width]


def test_no_other_method_has_a_reduction_to_wait_in() -> None:
    assert set(KINDS) - set(SENSING) == {*TWO_GRADIENTS, *FIXED}
