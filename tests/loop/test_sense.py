"""The sense stage: micro-batches of one rank; several ranks are in test_ranks.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mmfuse import NoiseStream
from mmfuse.loop.contract import Clock
from mmfuse.loop.modalities import Modalities
from mmfuse.loop.sense import Senses
from mmfuse.methods.ogm import OGMRule
from mmfuse.ops._eager import Eager

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
    means = sensed.means
    seen = looks.take({}, sensed, None)
    assert seen.means is means
    assert seen.count == 2


def test_several_are_averaged_over_their_labelled_rows() -> None:
    looks = senses()
    first = looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None)
    looks.add({}, first)
    second = looks({}, STREAM, CLOCK, None, logits(1), LABELS[:1], None, None)
    seen = looks.take({}, second, None)
    torch.testing.assert_close(seen.means, (2 * first.means + second.means) / 3)
    assert seen.count == 3 and seen.parts is None


def test_what_is_cleared_is_forgotten() -> None:
    looks = senses()
    looks.add({}, looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None))
    looks.clear()
    second = looks({}, STREAM, CLOCK, None, logits(3), LABELS, None, None)
    assert looks.take({}, second, None).means is second.means


class TestProbabilities:
    """Logits that have been through a softmax: the scores would be those of flatter ones."""

    def look(self, logits: dict[str, torch.Tensor]) -> None:
        looks = senses()
        for _ in range(2):  # the second time nobody looks
            looks({}, STREAM, CLOCK, Eager(""), logits, LABELS, None, None)

    def test_they_are_warned_of_once(self) -> None:
        given = logits(3)
        given["b"] = given["b"].softmax(1)
        with pytest.warns(RuntimeWarning, match=r"logits\['b'\] look like probabilities") as seen:
            self.look(given)
        assert len(seen) == 1

    def test_in_half_precision(self) -> None:
        given = {n: torch.randn(3, 40).softmax(1).bfloat16() for n in "ab"}
        with pytest.warns(RuntimeWarning, match="look like probabilities"):
            self.look(given)

    @pytest.mark.parametrize(
        "change", [lambda z: z, lambda z: z.relu() + 0.1, lambda z: z.softmax(1) * 2, torch.sigmoid]
    )
    def test_others_are_not(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        given = {n: change(torch.randn(3, 5, generator=generator)) for n in "ab"}
        self.look(given)
