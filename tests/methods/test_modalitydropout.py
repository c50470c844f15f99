"""Modality dropout: its rates, and that nobody loses everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor

import mmfuse

ROWS = 4000


def features_of(count: int, device: Any = "cpu", rows: int = ROWS) -> dict[str, Tensor]:
    names = ("audio", "visual", "text")[:count]
    return {name: torch.randn(rows, 2 + i, device=device) for i, name in enumerate(names)}


def near(found: Tensor, probability: float, rows: float) -> bool:
    """True within five standard deviations of a binomial: wrong once in 1.7 million."""
    deviation = (probability * (1 - probability) / rows) ** 0.5
    return abs(float(found) - probability) <= 5 * deviation + 1e-12


@pytest.mark.parametrize("count", [2, 3])
def test_rates_and_features(cell: Cell, count: int) -> None:
    rates = dict(zip(("audio", "visual", "text"), (0.2, 0.5, 0.0), strict=False))
    rates = {name: rates[name] for name in list(rates)[:count]}
    dropout = mmfuse.ModalityDropout(
        rates, stream=mmfuse.NoiseStream(3, cell.device), backend=cell.backend
    )
    features = features_of(count, cell.device, 700 if cell.backend == "triton" else ROWS)
    rows = len(features["audio"])
    for f in features.values():
        f.requires_grad_()
    out = dropout(features)
    for m, (name, f) in enumerate(features.items()):
        expected = f.detach() * out.keep[m].unsqueeze(1)
        torch.testing.assert_close(out.features[name], expected, rtol=0, atol=0)
    sum(f.sum() for f in out.features.values()).backward()
    for m, f in enumerate(features.values()):
        assert torch.equal(f.grad[:, 0].bool(), out.keep[m])
    assert out.keep.any(0).all()
    if count == 3:  # the third is always there, so that nothing is given back
        for m, rate in enumerate(rates.values()):
            assert near(out.keep[m].float().mean(), 1 - rate, rows)


def test_who_loses_all_keeps_one_of_them_evenly() -> None:
    dropout = mmfuse.ModalityDropout(1.0, num_modalities=3, stream=mmfuse.NoiseStream(1))
    keep = dropout(features_of(3)).keep
    assert (keep.sum(0) == 1).all()
    for m in range(3):
        assert near(keep[m].float().mean(), 1 / 3, ROWS)


def test_the_last_that_is_present_is_kept() -> None:
    present = {name: torch.rand(ROWS) > 0.4 for name in ("audio", "visual", "text")}
    dropout = mmfuse.ModalityDropout(0.9, num_modalities=3, stream=mmfuse.NoiseStream(2))
    keep = dropout(features_of(3), present=present).keep
    here = torch.stack(list(present.values()))
    assert not (keep & ~here).any()
    assert torch.equal(keep.any(0), here.any(0)), "nothing is left only of those who have nothing"
    two = here[0] & here[1] & ~here[2]
    alone = keep[:, two].sum(0) == 1
    assert near(keep[0, two][alone].float().mean(), 0.5, int(alone.sum()))


def test_names_go_with_their_rates_in_any_order() -> None:
    dropout = mmfuse.ModalityDropout({"visual": 0.0, "audio": 1.0})
    out = dropout(features_of(2))
    assert not out.keep[0].any() and out.keep[1].all()


def test_steps_differ_and_a_state_brings_them_back() -> None:
    features, dropout = features_of(2), mmfuse.ModalityDropout(0.5)
    saved = {name: x.clone() for name, x in dropout.state_dict().items()}
    first, second = dropout(features).keep, dropout(features).keep
    assert not torch.equal(first, second)
    other = mmfuse.ModalityDropout(0.5, name="other")
    assert not torch.equal(other(features).keep, first)
    other.load_state_dict(saved)
    assert torch.equal(other(features).keep, first)


def test_it_passes_in_evaluation_and_outside_of_its_epochs() -> None:
    features = features_of(2)
    dropout = mmfuse.ModalityDropout(1.0, starts=1)
    for epoch, train, passes in ((0, True, True), (1, True, False), (1, False, True)):
        dropout.train(train).set_epoch(epoch)
        out = dropout(features)
        assert all(torch.equal(out.features[n], f) for n, f in features.items()) == passes
        assert bool(out.keep.all()) == passes


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rates": 1.5}, ValueError, r"rates must be a probability in \[0, 1\], got 1.5"),
        ({"rates": "0.5"}, TypeError, "rates must be a number, got str"),
        ({"rates": {"a": 0.1, "b": -1}}, ValueError, r"rates\['b'\] must be a probability"),
        ({"rates": {"a": 0.1}}, ValueError, "num_modalities must be at least 2"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.ModalityDropout(**arguments)


def test_bad_features() -> None:
    dropout = mmfuse.ModalityDropout({"a": 0.1, "b": 0.2})
    before = dropout.noise_state.clone()
    with pytest.raises(ValueError, match=r"missing \['a', 'b'\]; unknown \['audio', 'visual'\]"):
        dropout(features_of(2))
    with pytest.raises(TypeError, match=r"present\['a'\] must be a bool tensor"):
        dropout({"a": torch.ones(2, 1), "b": torch.ones(2, 1)}, present={"a": 1, "b": 1})
    assert torch.equal(dropout.noise_state, before)
