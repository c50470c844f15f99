"""`released/inforeg.py`, both releases, and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import inforeg


@free_and_forced
@pytest.mark.parametrize("release", ["november", "march"])
def test_the_sequence_is_the_authors(
    release: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden(f"inforeg_{release}")
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced, backwards=3)
    backward = inforeg.backward_thrice

    def backward_and_look(*losses: torch.Tensor) -> None:
        backward(*losses)
        run.raw()

    monkeypatch.setattr(inforeg, "backward_thrice", backward_and_look)
    training = inforeg.Training(model, run, getattr(inforeg, release.upper()))
    # No epoch's growth lies so near the threshold that the numbers alone would tell.
    assert training.release.threshold == golden.hp("threshold")
    per_epoch = int(golden.hp("steps_per_epoch"))
    for t in run.steps():
        if t % per_epoch == 0:
            training.start_epoch()
        inputs, labels = run.batch()
        seen = training.step(**inputs, labels=labels)
        run.record(
            loss=torch.stack(seen.losses),
            score=numbers(seen.scores),
            coefficient=numbers(seen.strengths),
            window=training.growth,
        )
        if t % per_epoch == per_epoch - 1:
            training.end_epoch()
            run.record(trace=numbers(traces[-1] for traces in training.traces.values()))
    run.check()
