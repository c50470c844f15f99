"""`released/mmpareto.py` and the authors' own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from trajectory import AsReleased, Golden, Replay, free_and_forced, numbers, sgd

from released import mmpareto


@free_and_forced
def test_the_sequence_is_the_authors(forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden("mmpareto")
    assert golden.hp("gamma") == mmpareto.GAMMA
    model = AsReleased(golden)
    run = Replay(golden, model, sgd(golden, model), forced, backwards=4)
    backward = mmpareto.backward_of_the_sum

    def backward_and_look(losses: Sequence[Tensor]) -> None:
        backward(losses)
        run.raw()

    monkeypatch.setattr(mmpareto, "backward_of_the_sum", backward_and_look)
    training = mmpareto.Training(model, run)
    training.start_epoch()
    for _ in run.steps():
        inputs, labels = run.batch()
        seen = training.step(**inputs, labels=labels)
        for loss, found in (("joint", seen.joint), ("unimodal", seen.unimodal)):
            for rows in found.values():
                run.record(**{f"grad_{loss}.{k}": g for k, g in rows.items() if k != "concat"})
        run.record(
            loss=numbers(seen.losses),
            cosine=numbers(seen.cosines.values()),
            weights=torch.tensor(list(seen.weights.values()), dtype=torch.float64),
        )
    run.check()
    conflict = run["cosine"] <= 0
    assert conflict.sum(0).tolist() == [7, 8], "audio, visual"
    assert (run["weights"][~conflict] == 0.5).all()


def rows(*values: float) -> dict[str, Tensor]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"a": tensor[:1], "b": tensor[1:], "concat": tensor}


def test_what_the_file_does_not_show_of_the_solver() -> None:
    """Its cases are a gradient of zeros, and products that are as large as both copies together."""
    assert mmpareto.min_norm_weights(rows(0, 0), rows(1, 2)) == (0.999, 1 - 0.999)
    assert mmpareto.min_norm_weights(rows(1, 2), rows(0, 0)) == (0.001, 0.999)
    assert mmpareto.min_norm_weights(rows(9999, 0), rows(0, 9999)) == (0.5, 0.5)
    for joint, unimodal in ((rows(1e4, 0), rows(0, 1e4)), (rows(1, 0), rows(torch.nan, 1))):
        with pytest.raises(ArithmeticError, match="shortest vector's squared norm is"):
            mmpareto.min_norm_weights(joint, unimodal)
