"""ARM.official and the authors' code, twelve steps."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, free_and_forced, on_every_backend, sgd

import mmfuse


@on_every_backend
@free_and_forced
@pytest.mark.parametrize(
    ("name", "negative", "tolerance"),
    # Large weights amplify rounding.
    [("arm_official_relu", 2, 1e-9), ("arm_official_signed", 3, 1e-8)],
)
def test_official_reproduces_the_released_code(
    cell: Cell, name: str, negative: int, tolerance: float, forced: bool
) -> None:
    cell.skip_slow(name != "arm_official_relu" or not forced)
    mmfuse.use_backend(cell.backend)
    golden = Golden(name)
    model = Network(golden, relu=name.endswith("relu"))
    arm = mmfuse.ARM.official()
    run = Replay(golden, model, sgd(golden, model), forced)
    for _ in run.steps():
        inputs, labels = run.batch()
        features = model.features(inputs)
        fused = model.neck(torch.cat([features["visual"], features["audio"]], 1))
        own = {name: model.classifier(feature) for name, feature in features.items()}
        result = arm(features, fused, own, model.classifier(fused), labels)
        joint = torch.cat([result.features["visual"], result.features["audio"]], 1)
        logits = model.classifier(model.fusion(joint))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        fused_score = mmfuse.ops.modality_scores([model.classifier(fused)], labels).prob
        run.record(
            **{f"feature.{name}": feature for name, feature in features.items()},
            **{"feature.fused": fused},
            score=torch.cat([result.scores, fused_score]),
            nmi=result.nmi,
            ncmi=result.ncmi,
            contribution=result.contributions,
            weight=result.weights,
            logits=logits,
            loss=loss,
        )
        run.step()

    run.check(tolerance=tolerance)
    # The weights are not clamped and not bounded.
    assert int((run["weight"] < 0).any(1).sum()) == negative
    assert run["weight"].abs().max() > 10
