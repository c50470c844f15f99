"""The sense stage: micro-batches of one rank; several ranks are in test_ranks.py."""

from __future__ import annotations

import torch
from torch import nn

from mmfuse import NoiseStream
from mmfuse.loop.contract import Clock
from mmfuse.loop.modalities import Modalities
from mmfuse.loop.sense import Senses
from mmfuse.methods.ogm import OGMRule

LABELS = torch.tensor([0, 1, -100])
CLOCK, STREAM = Clock(0, 0), NoiseStream(0)


def senses() -> Senses:
    nets = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    return Senses("OGM", OGMRule(), Modalities(nets), None)


def logits(rows: int) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(rows, 2), "b": torch.randn(rows, 2)}


def test_one_micro_batch_comes_back_as_it_was_seen() -> None:
    looks = senses()
    sensed = looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None)
    seen = looks.take({}, sensed, LABELS, None)
    assert seen.means is sensed.means
    assert seen.count == 2


def test_several_are_averaged_over_their_labelled_rows() -> None:
    looks = senses()
    first = looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None)
    looks.add({}, first, LABELS)
    second = looks({}, STREAM, CLOCK, None, logits(1), LABELS[:1], None, None)
    seen = looks.take({}, second, LABELS[:1], None)
    torch.testing.assert_close(seen.means, (2 * first.means + second.means) / 3)
    assert seen.count == 3 and seen.parts is None


def test_what_is_cleared_is_forgotten() -> None:
    looks = senses()
    looks.add({}, looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None), LABELS)
    looks.clear()
    second = looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None)
    assert looks.take({}, second, LABELS, None).means is second.means
