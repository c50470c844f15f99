"""Twin.official and the authors' code, for two modalities and for three."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cells import Cell
from torch.nn import functional as F
from trajectory import (
    AsReleased,
    Golden,
    Network,
    Replay,
    free_and_forced,
    numbers,
    on_every_backend,
    sgd,
)

import mmfuse
from mmfuse.scores import error_ratios
from released import twin

of_every_file = pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("mlb_m2", [2, 8]),
        ("mlb_m2_beta", [1, 9]),
        ("mlb_m3", [2, 7, 8]),
        ("mlb_m3_beta", [2, 8, 8]),
        ("mlb_m3_regression", [0, 4, 7]),
    ],
)


def replay(made: Callable[..., mmfuse.Twin], name: str, behind: list[int], forced: bool) -> None:
    golden = Golden(name)
    model = Network(golden)
    heads = {m: getattr(model, f"head_{m}") for m in model.encoders}
    parts = {m: [*net.parameters(), heads[m].weight] for m, net in model.encoders.items()}
    beta = golden.hp("beta") if "hp.beta" in golden else 2.0
    twin = made(parts, alpha=golden.hp("alpha"), beta=beta)
    twin.set_epoch(0)
    run = Replay(golden, model, sgd(golden, model), forced)
    for _ in run.steps():
        inputs, labels = run.batch()
        share = model.head_audio.bias / len(heads)
        logits = {m: F.linear(f, heads[m].weight, share) for m, f in model.features(inputs).items()}
        outputs = (sum(logits.values()), *logits.values())
        if name == "mlb_m3_regression":
            losses = [F.mse_loss(z.squeeze(1), labels) for z in outputs]
            sum(losses).backward()
            alone = {m: z.squeeze(1) for m, z in logits.items()}
            result = twin.step(ratios=error_ratios(alone, labels))
            scores = torch.stack(losses[1:]).detach()  # the released ones are the errors
        else:
            losses = [F.cross_entropy(z, labels) for z in outputs]
            sum(losses).backward()
            result = twin.step(logits, labels)
            scores = result.scores
        run.record(
            loss=torch.stack(losses),
            score=scores,
            ratio=result.ratios,
            coefficient=result.coefficients,
        )
        run.step()
    run.check()
    assert (run["coefficient"] > 1).sum(0).tolist() == behind


@on_every_backend
@free_and_forced
@of_every_file
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, behind: list[int], forced: bool
) -> None:
    cell.skip_slow(name != "mlb_m3_beta" or not forced)
    mmfuse.use_backend(cell.backend)
    replay(mmfuse.Twin.official, name, behind, forced)


@of_every_file
def test_so_does_the_default(name: str, behind: list[int]) -> None:
    replay(mmfuse.Twin, name, behind, forced=False)


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
        seen = twin.step(
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
