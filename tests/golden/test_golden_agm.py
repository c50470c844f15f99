"""AGM.official and the authors' code: late fusion, and fusion before the head with batch norm."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


class Fused(Network):
    """The joint logits, from the inputs by their names."""

    def forward(self, **inputs: Tensor) -> Tensor:
        fused = torch.cat(list(self.features(inputs).values()), 1)
        return self.head(F.relu(self.mm(fused)) if hasattr(self, "mm") else fused)


#: How often each modality is slowed, and how often gradients are clipped.
of_every_file = pytest.mark.parametrize(
    ("name", "slowed", "clipped"),
    [
        ("agm_m2_latefusion", [5, 7], 4),
        ("agm_m2_midfusion_bn", [8, 4], 0),
        ("agm_m3_latefusion", [3, 7, 2], 0),
        ("agm_m3_midfusion_bn", [3, 2, 7], 0),
    ],
)


@on_every_backend
@free_and_forced
@of_every_file
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, slowed: list[int], clipped: int, forced: bool
) -> None:
    cell.skip_slow(name != "agm_m3_midfusion_bn" or not forced)
    mmfuse.use_backend(cell.backend)
    golden = Golden(name)
    model = Fused(golden)
    agm = mmfuse.AGM.official(
        alpha=golden.hp("alpha"),
        cap=golden.hp("cap") if "hp.cap" in golden else None,
        num_modalities=len(slowed),
        ends=int(golden.hp("last_modulated_epoch")) - 1,  # the authors count from 1
    )
    assert agm.rule.floor == golden.hp("floor")
    run = Replay(golden, model, sgd(golden, model), forced)
    for t in run.steps():
        inputs, labels = run.batch()
        agm.set_epoch(int(golden["epoch"][t]) - 1)
        responses = mmfuse.shapley_responses(model, inputs)
        out = agm(responses, labels)
        logits = sum(out.logits.values())
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        head = model.head.weight
        run.record(
            loss=loss,
            score=out.scores,
            ratio=out.ratios,
            running_ratio=out.usual_ratios,
            running_score_after=agm.running_scores.diagonal(),
            # The coefficient of this step, which after the last epoch is not in force.
            coefficient=agm.rule.coefficients(out.ratios, out.usual_ratios),
            coefficient_used=out.coefficients,
            response=torch.stack(list(responses.values())),
            logits=logits,
            head_grad_range=torch.stack(head.grad.aminmax()),
            clipped=agm.clip_(model.parameters(), head),
        )
        run.step()
    run.check()
    used = run["coefficient_used"]
    assert (used < 1).sum(0).tolist() == slowed
    assert int(run["clipped"].sum()) == clipped
    after = golden["epoch"] > golden.hp("last_modulated_epoch")
    assert after.any() and not used[after].equal(run["coefficient"][after])
