"""`released/pmr.py` and the authors' own numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from trajectory import AsReleased, Golden, Replay, difference, free_and_forced, numbers, sgd

from released import pmr

STEPS_IN_EPOCH = 4


@free_and_forced
def test_the_sequence_is_the_authors(forced: bool) -> None:
    golden = Golden("pmr_released")
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    given = [golden[f"prototype_x.{name}"] for name in ("audio", "visual")]
    found: list[list[Tensor]] = []
    for t in run.steps():
        epoch = int(golden["epoch"][t])
        if t % STEPS_IN_EPOCH == 0:
            batch = (given[0][epoch], given[1][epoch], golden["prototype_y"][epoch].long())
            made = pmr.prototypes(
                model,
                [tuple(x[:10] for x in batch), tuple(x[10:] for x in batch)],
                golden["prototypes.audio"].shape[1],
                golden["prototypes.audio"].shape[2],
                epoch=epoch,
                old=found[-1] if found else None,
                momentum=golden.hp("prototype_momentum"),
            )
            found.append(made)
            model.train()
        inputs, labels = run.batch()
        seen = pmr.step(
            model,
            run,
            **inputs,
            labels=labels,
            prototypes=found[-1],
            alpha=golden.hp("alpha"),
            epoch=epoch,
            ends=int(golden.hp("last_epoch")),
        )
        names = ("audio", "visual")
        logits = zip(names, seen.prototype_logits, strict=True)
        run.record(
            loss=numbers([seen.loss, *seen.losses, *seen.prototype_losses]),
            prototype_score=numbers(seen.scores),
            ratio=seen.ratio,
            coefficient=numbers(seen.coefficients),
            **{f"prototype_logits.{name}": z for name, z in logits},
        )
    run.check(hidden=("prototypes.audio", "prototypes.visual"))
    for m, name in enumerate(("audio", "visual")):
        stacked = torch.stack([each[m] for each in found])
        assert difference(stacked, golden[f"prototypes.{name}"]) is None, name
