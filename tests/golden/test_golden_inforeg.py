"""InfoReg.official and both of the authors' releases, twelve epochs of two steps."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from epochs import next_epoch
from torch import Tensor
from torch.nn import functional as F
from trajectory import Golden, Network, Replay, difference, free_and_forced, on_every_backend, sgd

import mmfuse


def growth_of(inforeg: mmfuse.InfoReg) -> Tensor:
    """The window's criterion: InfoReg shows its traces, and whether they grow enough."""
    traces = inforeg.state_dict()["state"]["traces"][0]
    if not traces.any():
        return torch.ones(())
    return (traces[-1] - traces[0]) / traces[1:].sum()


@on_every_backend
@free_and_forced
@pytest.mark.parametrize(
    ("release", "acts"),
    [("november", [11, 9, 4]), ("march", [5, 0, 19])],
    ids=["november", "march"],
)
def test_official_reproduces_the_released_code(
    cell: Cell, release: str, acts: list[int], forced: bool
) -> None:
    cell.skip_slow()
    mmfuse.use_backend(cell.backend)
    golden = Golden(f"inforeg_{release}")
    model = Network(golden)
    inforeg = mmfuse.InfoReg.official(model.encoders, release=release)
    assert inforeg.rule.threshold == golden.hp("threshold")
    run = Replay(golden, model, sgd(golden, model), forced)
    per_epoch, window_open = int(golden.hp("steps_per_epoch")), []
    for t in run.steps():
        if t % per_epoch == 0:
            next_epoch(inforeg)
            growth = growth_of(inforeg)
        inputs, labels = run.batch()
        features = model.features(inputs)
        out = model.head(torch.cat(list(features.values()), 1))
        if release == "november":
            logits = mmfuse.unimodal_logits(model.head, features)
        else:
            logits = {
                "audio": model.head_audio(features["audio"]),
                "visual": model.head_visual(features["visual"]),
            }
        losses = [F.cross_entropy(z, labels) for z in (out, *logits.values())]
        sum(losses).backward()
        result = inforeg.step(logits, labels)
        prob = mmfuse.ops.modality_scores(list(logits.values()), labels).prob
        run.record(
            loss=torch.stack(losses),
            # `result.scores` are the paper's mean log-probabilities.
            score=prob * len(labels),
            coefficient=result.coefficients,
            window=growth,
        )
        window_open.append(inforeg.window_open)
        run.step()
        if t % per_epoch == per_epoch - 1:
            run.record(trace=inforeg.fisher_trace)

    run.check()
    is_open = golden["window"] > golden.hp("threshold")
    assert torch.equal(torch.stack(window_open), is_open.unsqueeze(1).expand(-1, 2))
    next_epoch(inforeg)  # ends the last one
    traces = inforeg.state_dict()["state"]["traces"]
    history = torch.cat([golden["trace"].new_zeros(10, 2), golden["trace"]])
    assert difference(traces.T, history[-traces.shape[1] :]) is None

    pulled = run["coefficient"] != 0
    none = int((~pulled.any(1)).sum())
    assert [*pulled.sum(0).tolist(), none] == acts, "audio, visual, none"
    assert int((~is_open).sum()) == {"november": 4, "march": 10}[release]
