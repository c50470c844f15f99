"""CGGM.official and the authors' code, for classes and for a regression."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cells import Cell
from guided import Both, classified, clipped, fused
from torch import nn
from torch.nn import functional as F
from trajectory import Network, Replay, free_and_forced, on_every_backend

import mmfuse

of_every_file = pytest.mark.parametrize(
    ("name", "clips"), [("cggm_classification", 12), ("cggm_regression", 5)]
)


def replay(made: Callable[..., mmfuse.CGGM], name: str, clips: int, forced: bool) -> None:
    golden = clipped(name)
    regression = name == "cggm_regression"
    model = Network(golden)
    cggm = made(model.encoders, rho=golden.hp("rho"))
    cggm.set_epoch(0)
    optimizer = Both(golden, model)
    run = Replay(golden, model, optimizer, forced)
    task = F.l1_loss if regression else F.cross_entropy
    output = {m: getattr(model, f"classifier_{m}").out.weight for m in model.encoders}
    direction = []
    for _ in run.steps():
        inputs, labels = run.batch()
        features = model.features(inputs)
        out = fused(model, features)
        logits = classified(model, features)
        if regression:
            out, logits = out.squeeze(1), {m: z.squeeze(1) for m, z in logits.items()}
        direction.append(cggm.direction_loss(output, model.out.weight, 1.0))
        loss = task(out, labels) + golden.hp("direction_weight") * direction[-1]
        loss.backward()
        own = sum(mmfuse.unimodal_losses(logits, labels, criterion=task).values())
        own.backward()
        if regression:
            rates = {m: ((z > 0) == (labels > 0)).double().mean() for m, z in logits.items()}
            result = cggm.step(scores=rates)
        else:
            result = cggm.step(logits, labels)
        for key, p in model.named_parameters():
            if key.split(".")[0] in model.encoders:
                run.record(**{f"grad_modulated.{key}": p.grad})
        norm = nn.utils.clip_grad_norm_(optimizer.main, golden.hp("clip"))
        a = torch.stack([w.flatten() for w in output.values()])
        run.record(
            loss=loss,
            classifier_loss=own,
            metric=result.scores,
            difference=result.progress,
            coefficient=result.shares,
            cosine=F.cosine_similarity(a, model.out.weight.flatten()[None]),
            norm_before_clip=norm,
        )
        run.step()
    # The release has each step's term at once, and adds it in the next step.
    for term in direction[1:]:
        run.record(direction_loss=term)
    run.record(direction_loss=cggm.direction_loss(output, model.out.weight, 1.0))
    run.check()
    assert int((run["norm_before_clip"] > golden.hp("clip")).sum()) == clips
    # The release turns gradients around; no other clamp than the default's bound may come in.
    assert float(run["coefficient"].min()) < -0.9
    away = (run["coefficient"] - 1).abs() > 0.1
    assert bool(away.any(1).all()), "no step in which nothing is modulated"


@on_every_backend
@free_and_forced
@of_every_file
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, clips: int, forced: bool
) -> None:
    cell.skip_slow(name != "cggm_classification" or not forced)
    mmfuse.use_backend(cell.backend)
    replay(mmfuse.CGGM.official, name, clips, forced)
