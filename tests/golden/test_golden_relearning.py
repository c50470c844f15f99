"""ReLearning and its official(), and the authors' code: three phases, with a reset between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse

NAMES = ("audio", "visual")


def replay(made: Any, golden: Golden, forced: bool, backend: str | None = None) -> Replay:
    """The file's clusters stand in for k-means, whose implementations differ."""
    model, phase = Network(golden), int(golden.hp("steps_per_phase"))
    relearning = made(
        model.encoders, lam=golden.hp("move_lambda"), every=1, times=2, backend=backend
    )
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        out = model.head(torch.cat(list(model.features(inputs).values()), 1))
        loss = F.cross_entropy(out, labels)
        loss.backward()
        run.record(loss=loss)
        run.step()
        # The release's first epoch, after which there is no reset, is not in the file.
        epoch = (t + 1) // phase
        if (t + 1) % phase or not relearning.due(epoch):
            continue
        model.eval()
        with torch.no_grad():
            train = model.features({n: golden[f"x.{n}"][:phase].flatten(0, 1) for n in NAMES})
            val = model.features({n: golden[f"val_x.{n}"].flatten(0, 1) for n in NAMES})
        model.train()
        stored = iter(golden["clusters.train"][epoch - 1])
        stored_val = iter(golden["clusters.val"][epoch - 1])
        scaled: list[Tensor] = []

        def cluster(x: Tensor, stored=stored, stored_val=stored_val, scaled=scaled) -> Tensor:
            scaled.append(x)
            return next(stored if len(scaled) <= len(NAMES) else stored_val).long()

        seen = relearning.weights(
            train,
            golden["y"][:phase].flatten(),
            val,
            golden["val_y"].flatten().long(),
            cluster=cluster,
        )
        for split, features, made_of in (("train", train, scaled[:2]), ("val", val, scaled[2:])):
            for name, x in zip(NAMES, made_of, strict=True):
                run.record(**{f"features.{split}_{name}": features[name]})
                run.record(**{f"scaled_features.{split}_{name}": x})
        run.record(purity=seen.purities, weight=seen.coefficients)
        named = [x for x in model.named_parameters() if not x[0].startswith("head")]
        run.record(**{f"before_reset.{name}": p for name, p in named})
        relearning.reset(seen.coefficients)
        run.record(**{f"after_reset.{name}": p for name, p in named})
    return run


def check(run: Replay) -> None:
    """Everything; a bias before batch norm has a gradient of 0, of which a file holds roundings."""
    zero = {f"grad.{name}.0.bias" for name in NAMES}
    computed = run.golden.results | {key.replace("grad.", "grad_after.") for key in run.recorded}
    both = zero | {key.replace("grad.", "grad_after.") for key in zero}
    run.check(only={key for key in computed & set(run.recorded) if key not in both})
    for key in zero:
        # Sums of 8 rows, each of products of at most 1 in float64: 8 roundings of 1.
        for numbers in (run[key], run.golden[key]):
            assert float(numbers.abs().max()) < 8 * 2.0**-53, key


@on_every_backend
@free_and_forced
def test_the_class_reproduces_the_released_code(cell: Cell, forced: bool) -> None:
    cell.skip_slow(not forced)
    run = replay(mmfuse.ReLearning, Golden("relearning"), forced, cell.backend)
    check(run)
    # The first reset moves one encoder, the second one both.
    assert (run["weight"] > 0).tolist() == [[True, False], [True, True]]
    for name in NAMES:
        before, after = (run[f"{when}_reset.{name}.0.weight"] for when in ("before", "after"))
        assert torch.equal(before[0], after[0]) == (name == "visual")
        assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("forced", [True, False])
def test_official_is_the_same(forced: bool) -> None:
    check(replay(mmfuse.ReLearning.official, Golden("relearning"), forced))
