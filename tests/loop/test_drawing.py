"""Streams of modules: where they come from, and which numbers a rank draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancing import DROPPING, KINDS
from ranks import ranks
from torch import Tensor

import mmfuse
from mmfuse.loop.drawing import DrawingModule


def test_every_method_that_drops_is_one() -> None:
    assert len(DROPPING) >= 2
    for kind in DROPPING:
        assert issubclass(mmfuse.METHODS[KINDS[kind].method], DrawingModule)


class Drawing(DrawingModule):
    def __init__(self, name: str | None = None, stream: mmfuse.NoiseStream | None = None) -> None:
        super().__init__()
        self._set_window(0, None)
        self.process_group = self.backend = None
        self._begin_stream(stream, name)

    def draw(self, features: dict[str, Tensor]) -> Tensor:
        half = torch.full((len(features),), 0.5)
        keep = self.drop_features(list(features), list(features.values()), half, None).keep
        self._advance()
        return keep


def features(rows: int) -> dict[str, Tensor]:
    return {name: torch.ones(rows, 1) for name in ("audio", "visual")}


def test_a_stream_has_the_name_of_class_and_object() -> None:
    torch.manual_seed(0)
    first, again, other = Drawing(), Drawing(), Drawing("other")
    assert torch.equal(first.noise_state, again.noise_state)
    assert not torch.equal(first.noise_state, other.noise_state)
    assert not torch.equal(first.noise_state, mmfuse.ModalityDropout().noise_state)


def test_a_step_draws_other_numbers_and_reset_begins_anew() -> None:
    module = Drawing(stream=mmfuse.NoiseStream(3))
    first, second = module.draw(features(64)), module.draw(features(64))
    assert not torch.equal(first, second)
    module.reset_parameters()
    assert torch.equal(module.draw(features(64)), first)


def rank_draws(rank: int) -> dict[str, Any]:
    module = Drawing(stream=mmfuse.NoiseStream(7 + rank))  # the first rank's is taken over
    return {"keep": [module.draw(features(32)) for _ in range(2)], "state": module.noise_state}


def test_ranks_draw_the_numbers_of_the_whole_batch() -> None:
    module = Drawing(stream=mmfuse.NoiseStream(7))
    whole = [module.draw(features(64)) for _ in range(2)]
    found = ranks(2).run(rank_draws)
    for step in range(2):
        assert torch.equal(torch.cat([f["keep"][step] for f in found], 1), whole[step])
    assert torch.equal(found[0]["state"], found[1]["state"])


def test_on_the_meta_device_it_keeps_its_first_numbers() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        module = Drawing()
    assert module.noise_state.is_meta
    torch.manual_seed(0)
    assert torch.equal(module.to_empty(device="cpu").noise_state, Drawing().noise_state)


def test_a_stream_on_the_meta_device_holds_nothing() -> None:
    stream = mmfuse.NoiseStream.from_state(torch.empty(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="noise_state is on the meta device"):
        Drawing(stream=stream)
