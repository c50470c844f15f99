"""OGM.official and the authors' code, OGM and OGM-GE, four steps each of epochs 0, 50 and 51."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


def draws(golden: Golden) -> Iterator[Tensor]:
    """The file's noise in the order in which the encoders' gradients ask for it."""
    noise = golden.starting_with("noise.")
    for parts in zip(*noise.values(), strict=True):
        yield from parts


@on_every_backend
@free_and_forced
@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("ogm_plain_concat", [7, 5]),
        ("ogm_plain_sum", [2, 10]),
        ("ogm_ge_concat", [5, 7]),
        ("ogm_ge_sum", [2, 10]),
    ],
)
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, acts: list[int], forced: bool
) -> None:
    cell.skip_slow(name != "ogm_ge_concat" or not forced)
    mmfuse.use_backend(cell.backend)
    golden = Golden(name)
    model = Network(golden)
    noise = draws(golden) if "_ge_" in name else None
    ogm = mmfuse.OGM.official(
        model.encoders,
        alpha=golden.hp("alpha"),
        noise=False if noise is None else lambda grad: next(noise),
    )
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        ogm.set_epoch(int(golden["epoch"][t]))
        inputs, labels = run.batch()
        features = model.features(inputs)
        if "concat" in name:
            out = model.head(torch.cat(list(features.values()), 1))
            logits = mmfuse.unimodal_logits(model.head, features)
        else:
            logits = {
                "audio": model.head_audio(features["audio"]),
                "visual": model.head_visual(features["visual"]),
            }
            out = logits["audio"] + logits["visual"]
        losses = [F.cross_entropy(z, labels) for z in (out, *logits.values())]
        if forced:
            losses[0].backward()
            result = ogm.step(logits, labels)
        else:
            result = ogm.backward(losses[0], logits, labels)
        coefficients = result.coefficients
        if not ogm.modulating:
            assert coefficients.tolist() == [1, 1]
            # The release goes on computing, and applies nothing.
            coefficients = mmfuse.ogm_coefficients(result.ratios, golden.hp("alpha"), "cvpr")
        run.record(
            loss=torch.stack(losses),
            score=result.scores * len(labels),  # the release adds up
            ratio=result.ratios,
            coefficient=coefficients,
            applied=ogm.modulating,
            lr=run.optimizer.param_groups[0]["lr"],
        )
        run.step()
    run.check()
    assert (run["coefficient"] < 1).sum(0).tolist() == acts, "audio, visual"
    assert run["applied"].tolist() == [1] * 8 + [0] * 4
    if noise is not None:
        assert next(noise, None) is None, "not all of the noise was asked for"
