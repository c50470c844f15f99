"""ARL.official and the authors' code, in two releases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import Cell
from torch import nn
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


@on_every_backend
@free_and_forced
@pytest.mark.parametrize("release", ["later", "july"])
def test_official_reproduces_the_released_code(cell: Cell, release: Any, forced: bool) -> None:
    cell.skip_slow(release != "later" or not forced)
    mmfuse.use_backend(cell.backend)
    golden = Golden({"later": "arl_later", "july": "arl_july2025"}[release])
    model = Network(golden)
    arl = mmfuse.ARL.official(golden.hp("T"), golden.hp("gamma"), release=release)
    assert arl.starts == golden.hp("start") + 1
    run = Replay(golden, model, sgd(golden, model), forced)
    clipped = 0

    def head(features: dict[str, torch.Tensor], *there: str) -> torch.Tensor:
        """Logits of the whole head; zeros stand for modalities that are left out."""
        shown = [f if name in there else torch.zeros_like(f) for name, f in features.items()]
        return model.head(torch.cat(shown, 1))

    for t in run.steps():
        inputs, labels = run.batch()
        arl.set_epoch(int(golden["epoch"][t]))
        features = model.features(inputs)
        with torch.no_grad():
            logits = {name: head(features, name) for name in features}
        out = arl(features, logits, labels)
        logits = {name: head(out.features, name) for name in features}
        weight = arl.loss_weight
        losses = mmfuse.unimodal_losses(logits, labels, weights=weight)
        joint = F.cross_entropy(head(out.features, *features), labels)
        loss = joint + sum(losses.values())
        loss.backward()
        run.record(
            loss=torch.stack([loss, joint, *(each / weight for each in losses.values())]),
            magnitude=out.magnitudes,
            entropy_share=out.entropies,
            inverse_entropy_share=out.certainties,
            # The release computes weights where it uses them.
            weight_computed=out.weights * float(arl.modulating),
            weight_applied=out.coefficients - 1,
            unimodal_loss_weight=weight,
        )
        norm = nn.utils.clip_grad_norm_(model.parameters(), golden.hp("clip"))
        clipped += bool(norm > golden.hp("clip"))
        run.step()
    run.check()
    assert clipped == 1
    acting = run["weight_applied"] > 0
    assert acting.sum(0).tolist() == [6, 6]
    unequal = (run["weight_applied"][:, 0] != run["weight_applied"][:, 1]).sum()
    assert int(unequal) == {"later": 5, "july": 0}[release]
