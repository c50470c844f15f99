"""PMR.official and the authors' code; PMR and numbers transcribed from the paper's equations."""

from __future__ import annotations

from typing import Any

import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, difference, free_and_forced, on_every_backend, sgd

import mmfuse

STEPS_IN_EPOCH = 4


def replay(golden: Golden, pmr: Any, forced: bool) -> tuple[Replay, list[list[Tensor]]]:
    """The run, and each epoch's prototypes."""
    model, prototypes = Network(golden), []
    run = Replay(golden, model, sgd(golden, model), forced)
    names = ("audio", "visual")
    given, labels_of_given = golden.starting_with("prototype_x."), golden["prototype_y"].long()
    for t in run.steps():
        epoch = int(golden["epoch"][t])
        if t % STEPS_IN_EPOCH == 0:
            pmr.set_epoch(epoch)
            with torch.no_grad():
                seen = model.features({name: given[name][epoch] for name in names})
            # The file has three parts, which are to be added up.
            parts = zip(
                *(x.split(9) for x in (*seen.values(), labels_of_given[epoch])), strict=True
            )
            pmr.update_prototypes((dict(zip(names, (a, v), strict=True)), y) for a, v, y in parts)
            prototypes.append([each.clone() for each in pmr.prototypes])
        inputs, labels = run.batch()
        features = model.features(inputs)
        joint = F.cross_entropy(model.head(torch.cat(list(features.values()), 1)), labels)
        out = pmr(features, labels)
        total = joint + out.loss
        total.backward()
        if out.entropies is None and "prototype_logits.audio" in golden:
            own = mmfuse.unimodal_logits(model.head, features).values()
            losses = [total, *(F.cross_entropy(z, labels) for z in own), *out.prototype_losses]
            run.record(**{f"prototype_logits.{k}": z for k, z in out.prototype_logits.items()})
        else:
            entropies = [
                -(z.log_softmax(1) * z.softmax(1)).sum(1).mean()
                for z in out.prototype_logits.values()
            ]
            if out.entropies is not None:
                torch.testing.assert_close(
                    out.entropies, torch.stack(entropies), rtol=1e-12, atol=0
                )
            losses = [total, joint, *out.prototype_losses, *entropies]
        run.record(
            loss=torch.stack([x.detach() for x in losses]),
            prototype_score=out.scores * len(labels),  # the release adds up
            ratio=out.ratios[0],
            coefficient=out.coefficients,
        )
        run.step()
    return run, prototypes


def check(run: Replay, prototypes: list[list[Tensor]]) -> None:
    """Everything in the file, the prototypes of each epoch among it."""
    named = {f"prototypes.{name}": m for m, name in enumerate(("audio", "visual"))}
    run.check(hidden=named)
    for key, m in named.items():
        found = torch.stack([each[m] for each in prototypes])
        assert difference(found, run.golden[key]) is None, key


@on_every_backend
@free_and_forced
def test_official_reproduces_the_released_code(cell: Cell, forced: bool) -> None:
    cell.skip_slow(not forced)
    mmfuse.use_backend(cell.backend)
    golden = Golden("pmr_released")
    pmr = mmfuse.PMR.official(
        golden.hp("alpha"),
        momentum=golden.hp("prototype_momentum"),
        ends=int(golden.hp("last_epoch")),
    )
    run, prototypes = replay(golden, pmr, forced)
    check(run, prototypes)
    assert (run["coefficient"] > 0).sum(0).tolist() == [4, 4], "audio, visual"
    assert not run["coefficient"][2 * STEPS_IN_EPOCH :].any(), "after the last epoch"


@on_every_backend
@free_and_forced
def test_the_papers_equations(cell: Cell, forced: bool) -> None:
    """No release has them: a clip, and entropies in the first epochs."""
    cell.skip_slow(not forced)
    mmfuse.use_backend(cell.backend)
    golden, paper = Golden("pmr_paper"), mmfuse.PMR
    pmr = paper(
        golden.hp("alpha"),
        golden.hp("mu"),
        golden.hp("prototype_momentum"),
        entropy_epochs=int(golden.hp("regularised_epochs")),
    )
    run, prototypes = replay(golden, pmr, forced)
    check(run, prototypes)
    assert (run["coefficient"] > 0).sum(0).tolist() == [2, 10], "audio, visual"
    assert ((run["coefficient"] > 0) & (run["coefficient"] < 1)).any(1).all(), "no clip, no tie"
