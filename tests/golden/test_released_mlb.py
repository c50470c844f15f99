"""`released/mlb.py`, two modalities and three, and the authors' own numbers."""

from __future__ import annotations

import pytest
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import mlb


@free_and_forced
@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("mlb_m2", [2, 8]),
        ("mlb_m2_beta", [1, 9]),
        ("mlb_m3", [2, 7, 8]),
        ("mlb_m3_beta", [2, 8, 8]),
        ("mlb_m3_regression", [0, 4, 7]),
    ],
)
def test_the_sequence_is_the_authors(name: str, behind: list[int], forced: bool) -> None:
    golden = Golden(name)
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    for _ in run.steps():
        inputs, labels = run.batch()
        seen = mlb.step(
            model,
            run,
            **inputs,
            labels=labels,
            alpha=golden.hp("alpha"),
            beta=golden.hp("beta") if "hp.beta" in golden else None,
            regression=name.endswith("regression"),
            epoch=0,
        )
        run.record(
            loss=numbers(seen.losses),
            score=numbers(seen.scores),
            ratio=numbers(seen.ratios),
            coefficient=numbers(seen.coefficients),
        )
    run.check()
    assert (run["coefficient"] > 1).sum(0).tolist() == behind
    assert "grad_after.head_audio.bias" not in golden, "the shared bias is not scaled"


def test_after_the_last_epoch_factors_are_not_used() -> None:
    """The files show only the epochs before."""
    golden = Golden("mlb_m2")
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced=False)
    for t in run.steps():
        inputs, labels = run.batch()
        epoch = mlb.ENDS + (t > 0)
        mlb.step(model, run, **inputs, labels=labels, alpha=golden.hp("alpha"), epoch=epoch)
    for name in ("audio.0.weight", "visual.2.bias", "head_visual.weight"):
        before, after = run[f"grad.{name}"], run[f"grad_after.{name}"]
        assert not before[0].equal(after[0])
        assert before[1:].equal(after[1:])
