"""Errors for what users get wrong: they name mmfuse's argument, and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfuse
from mmfuse import METHODS, GradientMethod

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("audio", "visual")
#: Methods that are called in the forward pass, and take no encoders.
IN_MODEL = [n for n, m in METHODS.items() if m.card.acts in ("feature", "logits", "loss")]
LABELS = torch.tensor([0, 1, 2, 0])


def encoders() -> dict[str, nn.Module]:
    return {n: nn.Linear(5, 3) for n in NAMES}


def logits(rows: int = 4, classes: int = 3) -> dict[str, Tensor]:
    return {n: torch.randn(rows, classes) for n in NAMES}


def stepped(z: dict[str, Tensor], y: Any) -> None:
    nets = encoders()
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    before = [p.grad.clone() for net in nets.values() for p in net.parameters()]
    try:
        mmfuse.OGM(nets).step(z, y)
    finally:
        after = [p.grad for net in nets.values() for p in net.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Expanding(nn.Module):
    """Its bias has a gradient whose elements share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.bias.grad = torch.ones(1).expand(3)


def expanded() -> None:
    nets = {"audio": nn.Linear(5, 3), "visual": Expanding()}
    for p in nets["audio"].parameters():
        p.grad = torch.ones_like(p)
    mmfuse.OGM(nets).step(logits(), LABELS)


def monitored() -> None:
    nets = {n: nn.Conv2d(1, 2, 3) for n in NAMES}
    method = mmfuse.RedReg(nets)
    method.set_epoch(0)
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    inputs = {n: torch.randn(4, 5) for n in NAMES}
    method.step(logits(), LABELS, {n: torch.randn(4, 6) for n in NAMES}, inputs)


one_hot = nn.functional.one_hot(LABELS, 3)

#: A mistake of a user, the kind of error, and its text.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one-hot labels": (
        lambda: stepped(logits(), one_hot),
        ValueError,
        r"labels must be class indices \[B\], got shape \[4, 3\]; of one-hot labels take "
        r"labels\.argmax\(1\)",
    ),
    "probabilities of other classes": (
        lambda: stepped(logits(), one_hot.float()[:, :2]),
        ValueError,
        r"floating labels must have the shape of logits\['audio'\], \[4, 3\], got \[4, 2\]",
    ),
    "floating class indices": (
        lambda: stepped(logits(), LABELS.float()),
        TypeError,
        r"labels must be an integer tensor of class indices, got torch.float32 \[4\]; prob",
    ),
    "labels in a list": (
        lambda: stepped(logits(), [0, 1, 2, 0]),
        TypeError,
        "labels must be an integer tensor of class indices, got list$",
    ),
    "labels of another batch": (
        lambda: stepped(logits(rows=32), torch.zeros(16, dtype=torch.int64)),
        ValueError,
        r"logits\['audio'\] has 32 rows, labels 16",
    ),
    "a single logit": (
        lambda: stepped(logits(classes=1), LABELS),
        ValueError,
        r"logits\['audio'\] must have shape \[B, C\] with C of at least 2, got \[4, 1\]; one",
    ),
    "names of encoders": (
        lambda: mmfuse.OGM({"audio": "audio_net", "visual": "visual_net"}),
        TypeError,
        r"encoders\['audio'\] is the text 'audio_net'.*mmfuse\.match_parameters\(model, \{'audio'",
    ),
    "an encoder without parameters": (
        lambda: mmfuse.OGM({"audio": nn.Identity(), "visual": nn.Linear(2, 2)}),
        ValueError,
        r"encoders\['audio'\] \(Identity\) has no parameter: .* leave it out",
    ),
    "a lazy encoder": (
        lambda: mmfuse.InfoReg({"audio": nn.LazyLinear(3), "visual": nn.Linear(2, 2)}),
        ValueError,
        r"encoders\['audio'\]\.weight is lazy and has no shape yet: call the model once first",
    ),
    "an expanded gradient": (
        expanded,
        ValueError,
        r"the gradient of encoders\['visual'\]\.bias is an expanded view with strides \(0,\)",
    ),
    "an input that the encoder cannot take": (
        monitored,
        RuntimeError,
        r"the encoder of 'audio' cannot take its input, torch\.float32 \[4, 5\] with noise: .*"
        r"give forward=\{'audio': callable\}",
    ),
    "half an epoch": (
        lambda: mmfuse.OGM(encoders()).set_epoch(1.5),
        TypeError,
        "epoch must be an integer, got float",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(mistake: str) -> None:
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if issubclass(m, GradientMethod)])
def test_a_loss_of_each_sample(name: str) -> None:
    nets = encoders()
    method = METHODS[name](nets)
    method.set_epoch(0)
    z = {n: net(torch.randn(4, 5)) for n, net in nets.items()}
    loss = nn.functional.cross_entropy(z["audio"] + z["visual"], LABELS, reduction="none")
    more = {n: torch.randn(4, 5) for n in NAMES}
    losses = {n: loss.mean() for n in NAMES}
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \[4\]: take its mean"):
        method.backward(loss, z, LABELS, more, more, unimodal_losses=losses)
    assert all(p.grad is None for net in nets.values() for p in net.parameters())


@pytest.mark.parametrize("given", [encoders, lambda: encoders()["audio"].parameters()])
@pytest.mark.parametrize("name", IN_MODEL)
def test_a_module_of_the_model_is_given_encoders(name: str, given: Callable[[], Any]) -> None:
    """As the methods on gradients are, and as an adapter would."""
    made = METHODS[name]
    own = f"self.{name.lower()} = mmfuse.{name}()"
    page = f"docs/methods/{name.lower()}.md"
    message = f"{name} is a module of the model and takes no encoders: {own}; see {page}"
    for make in (made, *([made.official] if made.card.official else ())):
        with pytest.raises(TypeError, match=re.escape(message)):
            make(given())
    assert (ROOT / page).is_file()
    assert isinstance(eval(own.partition(" = ")[2]), made)


def test_numbers_by_name_are_no_encoders() -> None:
    assert mmfuse.ModalityDropout({"audio": 0.3, "visual": 0.1}).rates == (0.3, 0.1)
    with pytest.raises(TypeError, match=r"rates\['audio'\] must be a number, got Tensor"):
        mmfuse.ModalityDropout({"audio": torch.tensor(0.3), "visual": 0.1})  # type: ignore[dict-item]


def test_a_binary_logit_is_scored_by_the_way_out() -> None:
    z = torch.randn(6, 1).double()
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    found = mmfuse.ops.modality_scores([nn.functional.pad(z, (1, 0))], labels)
    p = torch.where(labels == 1, z.squeeze(1).sigmoid(), 1 - z.squeeze(1).sigmoid())
    torch.testing.assert_close(found.prob[0], p.mean())


def test_scalars_keep_their_digits_under_another_default_dtype() -> None:
    written: list[float] = []
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mmfuse.ScalarLog(
            lambda scalars, step: written.extend(scalars.values()), every=2
        ) as log:
            log.add(0, {"loss": torch.tensor(1.00048828125, dtype=torch.float32)})
            log.add(1, {"loss": torch.tensor(1.00048828125, dtype=torch.float64)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert written == [1.00048828125] * 2
