"""`released/mla.py`, both releases, and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from trajectory import AsReleased, Golden, difference, free_and_forced, numbers, sgd
from turns import ASIDE, TOLERANCE, Turns

from released import mla


@free_and_forced
@pytest.mark.parametrize("release", ["first", "head"])
def test_the_sequence_is_the_authors(release: str, forced: bool) -> None:
    golden = Golden(f"mla_{release}")
    model = AsReleased(golden)
    run = Turns(golden, model, sgd(golden, model), forced)
    projector = mla.Projector(model.fc, release)
    assert projector.matrix.equal(golden["projector.initial"])
    batches = int(golden.hp("steps_per_epoch"))
    for t in run.steps():
        inputs, labels = run.batch()
        seen = mla.step(
            model,
            run,
            **inputs,
            labels=labels,
            projector=projector,
            batch=t % batches,
            batches=batches,
        )
        for loss, matrix in zip(seen.losses, seen.projectors, strict=True):
            run.record(loss=loss, projector=matrix)
    run.check(ASIDE, TOLERANCE[golden.name])
    identity = torch.eye(len(projector.matrix), dtype=torch.float64)
    assert projector.matrix.equal(identity) == (release == "head")


def test_gates_are_the_authors() -> None:
    golden = Golden("mla_first")
    for sample, three, two in zip(
        golden["gating.logits"],
        golden["gating.weights_three"],
        golden["gating.weights_two"],
        strict=True,
    ):
        assert difference(numbers(mla.gates(list(sample)))[None], three[None]) is None
        assert difference(numbers(mla.gates(list(sample[:2])))[None], two[None]) is None
