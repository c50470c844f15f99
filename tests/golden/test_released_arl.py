"""`released/arl.py`, both releases, and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import arl


@free_and_forced
@pytest.mark.parametrize(("name", "assigns"), [("arl_later", True), ("arl_july2025", False)])
def test_the_sequence_is_the_authors(name: str, assigns: bool, forced: bool) -> None:
    golden = Golden(name)
    assert (golden.hp("T"), golden.hp("gamma")) == (arl.TEMPERATURE, arl.GAMMA)
    assert (golden.hp("start"), golden.hp("clip")) == (arl.START, arl.CLIP)
    assert golden.hp("entropy_floor") == arl.LEAST
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    training = arl.Training(model, run, assigns=assigns)
    for t in run.steps():
        inputs, labels = run.batch()
        seen = training.step(**inputs, labels=labels, epoch=int(golden["epoch"][t]))
        run.record(
            loss=numbers(seen.losses),
            magnitude=numbers(seen.magnitudes),
            entropy_share=numbers(seen.entropies),
            inverse_entropy_share=numbers(seen.certainties),
            weight_computed=numbers(seen.computed),
            weight_applied=numbers(seen.applied),
            unimodal_loss_weight=seen.unimodal_weight,
        )
    run.check()
    floored = torch.isclose(run["entropy_share"], torch.tensor(arl.LEAST, dtype=torch.float64))
    assert int(floored.sum()) == {"arl_later": 4, "arl_july2025": 5}[name]
