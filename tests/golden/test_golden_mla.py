"""MLA.official and the authors' code, in the first release and in the latest."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch.nn import functional as F
from trajectory import Golden, Network, difference, free_and_forced, on_every_backend, sgd
from turns import ASIDE, TOLERANCE, Turns

import mmfuse

of_every_file = pytest.mark.parametrize("release", ["first", "head"])


@free_and_forced
@of_every_file
def test_official_reproduces_the_released_code(release: str, forced: bool) -> None:
    golden = Golden(f"mla_{release}")
    model = Network(golden)
    batches = int(golden.hp("steps_per_epoch"))
    alpha = golden.hp("alpha_base")
    mla = mmfuse.MLA.official(model.head, release=release, alpha=alpha, batches=batches)
    assert mla.projector.equal(golden["projector.initial"])
    run = Turns(golden, model, sgd(golden, model), forced)
    kept = []
    for t in run.steps():
        mla.set_epoch(t // batches)
        inputs, labels = run.batch()
        for feature in model.features(inputs).values():
            loss = F.cross_entropy(model.head(feature), labels)
            loss.backward()
            kept.append(mla.step(feature).kept)
            run.record(loss=loss, projector=mla.projector)
            run.step()
            run.optimizer.zero_grad()
    run.check(ASIDE, TOLERANCE[golden.name])
    changed = (torch.stack(kept) - 1).abs() > 0.01
    assert changed.tolist() == [False] + [release == "first"] * (len(kept) - 1)
    # The order of features would make a difference.
    assert int(mla.turns) == len(kept)


@on_every_backend
@of_every_file
def test_fusion_is_that_of_the_release(cell: Cell, release: str) -> None:
    mmfuse.use_backend(cell.backend)
    golden = Golden(f"mla_{release}")
    model = Network(golden)
    logits = golden["gating.logits"]
    found = dict(zip(("audio", "visual", "text"), logits.unbind(1), strict=True))
    two = {name: found[name] for name in ("audio", "visual")}
    for mla in (mmfuse.MLA.official(model.head, release=release), mmfuse.MLA(model.head)):
        for which, given in (("three", found), ("two", two)):
            want = golden[f"gating.weights_{which}"]
            out = mla.fuse(given)
            assert difference(out.weights.T, want, 1e-9) is None
            fused = (want.unsqueeze(2) * logits[:, : len(given)]).sum(1)
            assert difference(out.logits, fused, 1e-9) is None
            assert bool((want.max(1).values > 1.15 / len(given)).any()), "weights differ"
