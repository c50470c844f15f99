"""`released/ogm.py` and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import ogm
from released.networks import halves, own_heads


@free_and_forced
@pytest.mark.parametrize(
    "name", ["ogm_plain_concat", "ogm_plain_sum", "ogm_ge_concat", "ogm_ge_sum"]
)
def test_the_sequence_is_the_authors(name: str, forced: bool) -> None:
    golden = Golden(name)
    model = AsReleased(golden)
    has_noise = "_ge_" in name
    noise = golden.starting_with("noise.").values() if has_noise else ()
    drawn = iter([z for parts in zip(*noise, strict=True) for z in parts])

    def draw(grad: Tensor, std: float) -> Tensor:
        return std * next(drawn)

    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        seen = ogm.step(
            model,
            run,
            **inputs,
            labels=labels,
            alpha=golden.hp("alpha"),
            epoch=int(golden["epoch"][t]),
            draw=draw if has_noise else None,
            own_logits=own_heads if name.endswith("sum") else halves,
        )
        run.record(
            loss=torch.stack([F.cross_entropy(z, labels) for z in seen.logits]),
            score=numbers(seen.scores),
            ratio=numbers(seen.ratios),
            coefficient=numbers(seen.coefficients),
            applied=seen.modulated,
            lr=run.param_groups[0]["lr"],
        )
    run.check()
    assert next(drawn, None) is None, "not all of the noise was asked for"
