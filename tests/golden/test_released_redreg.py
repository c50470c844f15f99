"""`released/redreg.py` and the authors' own numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import redreg


@pytest.fixture(autouse=True)
def _constants_in_float64() -> Iterator[None]:
    """The files were made so; the release's strengths have the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@free_and_forced
@pytest.mark.parametrize("name", ["redreg_r015", "redreg_r08"])
def test_the_sequence_is_the_authors(
    name: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden(name)
    # The monitor looks at the maps before they are averaged.
    model = AsReleased(golden, maps=True)
    run = Replay(golden, model, sgd(golden, model), forced, backwards=3)
    backward = redreg.backward_thrice

    def backward_and_look(*losses: torch.Tensor) -> None:
        backward(*losses)
        run.raw()

    monkeypatch.setattr(redreg, "backward_thrice", backward_and_look)
    if name == "redreg_r015":
        assert golden.hp("threshold") == redreg.THRESHOLD
    uniform = iter(golden["u.input_drop"])
    views = [golden[f"noise.{m}.{view}"] for m in ("audio", "visual") for view in (1, 2)]
    drawn = iter([z for parts in zip(*views, strict=True) for z in parts])
    training = redreg.Training(
        model,
        run,
        int(golden.hp("epochs")),
        threshold=golden.hp("threshold"),
        uniform=lambda: next(uniform),
        noise=lambda x: next(drawn),
    )
    for t in run.steps():
        if t % int(golden.hp("steps_per_epoch")) == 0:
            training.start_epoch(int(golden["epoch"][t]))
        inputs, labels = run.batch()
        seen = training.step(**inputs, labels=labels)
        redundancy, average, growth, phase = zip(*seen.monitored.values(), strict=True)
        run.record(
            loss=torch.stack(seen.losses),
            score=numbers(seen.scores.values()),
            growth=numbers(growth),
            redundancy=numbers(redundancy),
            redundancy_ema=numbers(average),
            phase=numbers(phase),
            similarity=redreg.all_pairs_cosine(*seen.features),
            similarity_threshold=training.agreement,
            gate=seen.gate,
            coefficient=numbers(seen.strengths),
            input_drop_probability=training.drop_probability,
            input_dropped=numbers(
                (x != given).any() for x, given in zip(seen.inputs, inputs.values(), strict=True)
            ),
        )
    run.check()
    assert next(drawn, None) is None and next(uniform, None) is None, "not all was asked for"


def test_inputs_are_dropped_less_and_less_for_three_tenths_of_the_epochs() -> None:
    """The files show the first of these epochs and one after them."""
    drawn = [redreg.drop_probability(epoch, 80) for epoch in (0, 12, 24, 79)]
    assert drawn == pytest.approx([0.6, 0.35, 0.1, 0.1])
