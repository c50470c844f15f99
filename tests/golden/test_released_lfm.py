"""`released/lfm.py` and the authors' own numbers."""

from __future__ import annotations

import torch
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import lfm


@free_and_forced
def test_the_schedule_is_the_authors(forced: bool) -> None:
    golden = Golden("lfm_schedule")
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        epoch = int(golden["epoch"][t])
        seen = lfm.step(model, run, **inputs, labels=labels, epoch=epoch)
        run.record(
            loss=numbers(seen.losses),
            weights=numbers(lfm.schedule(epoch)),
            **{f"logits.{name}": z for name, z in zip(inputs, seen.logits[1:], strict=True)},
        )
    run.check(hidden=["schedule"])
    every = torch.tensor([lfm.schedule(epoch) for epoch in range(200)], dtype=torch.float64)
    torch.testing.assert_close(every, golden["schedule"])


@free_and_forced
def test_the_learning_is_the_authors(forced: bool) -> None:
    golden = Golden("lfm_learnable")
    model = AsReleased(golden)
    names = list(golden.starting_with("hessian_vector."))
    parameters = [dict(model.named_parameters())[name] for name in names]
    assert names[0] == "audio.0.weight", "whose mean decides"
    held_out = golden.starting_with("validation_x.")
    learned = lfm.Learned(golden.hp("initial_rate"))
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        epoch = int(golden["epoch"][t])
        learned.learn(
            model, parameters, **held_out, labels=golden["validation_y"].long(), epoch=epoch
        )
        seen = lfm.step(model, run, **inputs, labels=labels, weights=learned.weights)
        run.record(
            loss=numbers(seen.losses),
            weights=numbers(learned.weights),
            weight_rate=learned.rate,
            weight_step=learned.step,
            **{f"logits.{name}": z for name, z in zip(inputs, seen.logits[1:], strict=True)},
            **{f"hessian_vector.{n}": h for n, h in zip(names, learned.products, strict=True)},
        )
    run.check()
