"""`released/agm.py`, two modalities and three, and the authors' own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import agm


class Fused(AsReleased):
    """A network for any number of modalities, with a layer between fusion and head."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = self.features(*inputs)
        fused = torch.cat(features, 1)
        return *features, self.head(F.relu(self.mm(fused)) if hasattr(self, "mm") else fused)


@free_and_forced
@pytest.mark.parametrize(
    ("name", "script", "slowed", "clipped"),
    [
        ("agm_m2_latefusion", agm.TWO, [5, 7], 4),
        ("agm_m2_midfusion_bn", agm.TWO, [8, 4], 0),
        ("agm_m3_latefusion", agm.THREE, [3, 7, 2], 0),
        ("agm_m3_midfusion_bn", agm.THREE, [3, 2, 7], 0),
    ],
)
def test_the_sequence_is_the_authors(
    name: str, script: agm.Script, slowed: list[int], clipped: int, forced: bool
) -> None:
    golden = Golden(name)
    assert script.floor == golden.hp("floor") and script.clip == golden.hp("clip")
    assert "hp.cap" not in golden or script.cap == golden.hp("cap")
    model = Fused(golden)
    run = Replay(golden, model, sgd(golden, model), forced)
    training = agm.Training(
        model,
        run,
        alpha=golden.hp("alpha"),
        script=script,
        ends=int(golden.hp("last_modulated_epoch")) - 1,  # the authors count from 1
    )
    for t in run.steps():
        inputs, labels = run.batch()
        seen = training.step(**inputs, labels=labels, epoch=int(golden["epoch"][t]) - 1)
        run.record(
            loss=seen.loss,
            score=numbers(seen.scores),
            ratio=numbers(seen.ratios),
            running_ratio=numbers(seen.running_ratios),
            running_score_after=numbers(training.running),
            coefficient=numbers(seen.coefficients),
            coefficient_used=numbers(training.coefficients),
            response=torch.stack(list(seen.responses)),
            logits=seen.logits,
            head_grad_range=seen.head_range,
            clipped=seen.clipped,
        )
    run.check()
    assert (run["coefficient_used"] < 1).sum(0).tolist() == slowed
    assert int(run["clipped"].sum()) == clipped
