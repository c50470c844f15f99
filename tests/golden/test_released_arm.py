"""`released/arm.py` and the authors' own numbers."""

from __future__ import annotations

import pytest
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import arm


@free_and_forced
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # The file promises no more: large weights amplify rounding.
    [("arm_official_relu", 1e-9), ("arm_official_signed", 1e-8)],
)
def test_the_sequence_is_the_authors(name: str, tolerance: float, forced: bool) -> None:
    golden = Golden(name)
    model = AsReleased(golden, relu=name.endswith("relu"))
    assert (golden.hp("nmi_bins"), golden.hp("ncmi_bins")) == (arm.BINS, arm.CONDITIONAL_BINS)
    run = Replay(golden, model, sgd(golden, model), forced)
    for _ in run.steps():
        inputs, labels = run.batch()
        seen = arm.step(model, run, **inputs, labels=labels)
        named = zip(("audio", "visual", "fused"), seen.features, strict=True)
        run.record(
            **{f"feature.{name}": feature for name, feature in named},
            score=numbers(seen.scores),
            nmi=numbers(seen.found.nmi),
            ncmi=numbers(seen.found.ncmi),
            contribution=numbers(seen.found.gains),
            weight=numbers(seen.found.weights),
            logits=seen.logits,
            loss=seen.loss,
        )
    run.check(tolerance=tolerance)
