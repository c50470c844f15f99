"""RedReg.official and the authors' code, twelve steps each of epochs 0 and 60 of 80."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import TOLERANCE, Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


def draws(golden: Golden) -> Iterator[Tensor]:
    """The file's noise in the order in which the monitor asks for it: two views of each input."""
    names = [f"noise.{modality}.{view}" for modality in ("audio", "visual") for view in (1, 2)]
    for t in range(golden.steps):
        yield from (golden[name][t] for name in names)


@on_every_backend
@free_and_forced
@pytest.mark.parametrize(
    ("name", "acts"), [("redreg_r015", [20, 4, 0]), ("redreg_r08", [15, 4, 5])]
)
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, acts: list[int], forced: bool
) -> None:
    cell.skip_slow()
    mmfuse.use_backend(cell.backend)
    golden = Golden(name)
    model = Network(golden)
    noise = draws(golden)
    redreg = mmfuse.RedReg.official(
        model.encoders,
        threshold=golden.hp("threshold"),
        epochs=int(golden.hp("epochs")),
        noise=lambda x: next(noise),
        # The released monitor looks at the maps before they are averaged.
        forward={name: encoder.maps for name, encoder in model.encoders.items()},
    )
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        if t % int(golden.hp("steps_per_epoch")) == 0:
            redreg.set_epoch(int(golden["epoch"][t]))
        inputs, labels = run.batch()
        seen = redreg.drop_inputs(inputs, golden["u.input_drop"][t])
        # The probability is not shown; it is where the second modality is no longer dropped.
        p = golden["input_drop_probability"][t]
        for uniform, is_dropped in ((p * (1 - TOLERANCE), True), (p * (1 + TOLERANCE), False)):
            at_the_border = redreg.drop_inputs(inputs, uniform)
            assert (not at_the_border["visual"].any()) == is_dropped
        features = model.features(seen)
        out = model.head(torch.cat(list(features.values()), 1))
        logits = {
            "audio": model.head_audio(features["audio"]),
            "visual": model.head_visual(features["visual"]),
        }
        losses = [F.cross_entropy(z, labels) for z in (out, *logits.values())]
        sum(losses).backward()
        result = redreg.step(logits, labels, features, inputs)
        state = redreg.state_dict()["state"]
        run.record(
            loss=torch.stack(losses),
            score=result.scores,
            growth=result.growth,
            redundancy=result.redundancy,
            redundancy_ema=state["average"],
            phase=result.phase,
            similarity=mmfuse.ops.paired_cosine(*features.values()),
            similarity_threshold=state["gate_threshold"],
            gate=result.gate,
            coefficient=result.coefficients,
            input_dropped=torch.stack([(x != inputs[m]).any() for m, x in seen.items()]),
        )
        run.step()

    run.check(hidden=["input_drop_probability"])
    assert next(noise, None) is None, "not all of the noise was asked for"
    regulated = run["coefficient"] != 0
    none = int((~regulated.any(1)).sum())
    assert [*regulated.sum(0).tolist(), none] == acts, "audio, visual, none"
    dominant = run["score"].argmax(1, keepdim=True)
    below = (run["phase"].gather(1, dominant) <= redreg.rule.threshold).squeeze(1)
    shut = (run["gate"] == 0) & ~below
    assert [int(below.sum()), int(shut.sum())] == ([3, 2] if acts[2] else [0, 0])
