"""OPM with samples that miss modalities, and with numbers of the user's own."""

from __future__ import annotations

import pytest
import torch
import ways
from ranks import ranks
from torch import Tensor, nn

import mmfuse
from mmfuse import OPM

NAMES = ("a", "v", "t")
ROWS = 64


def batch(modalities: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features without a zero, and logits of which the first are ahead of the others."""
    torch.manual_seed(0)
    names = NAMES[:modalities]
    labels = torch.randint(0, 4, (ROWS,))
    logits = {n: torch.randn(ROWS, 4) for n in names}
    for n, lead in zip(names, (4.0, 3.0, 0.0), strict=False):
        logits[n][torch.arange(ROWS), labels] += lead
    return {n: torch.rand(ROWS, 5) + 1 for n in names}, logits, labels


def everyone(modalities: int = 3) -> dict[str, Tensor]:
    return ways.everyone(NAMES[:modalities], ROWS)


def dropping(modalities: int = 3, **options: object) -> OPM:
    """An OPM that drops every modality that is ahead, with the probability 1."""
    made = OPM(1.0, num_modalities=modalities, stream=mmfuse.NoiseStream(1), **options)
    made.q.copy_(torch.tensor([1.0, 0.9, 0.0][:modalities]))
    return made


@pytest.mark.parametrize("official", [False, True])
def test_with_all_present_nothing_changes(official: bool) -> None:
    found = []
    for more in ({}, {"present": everyone()}):
        made = OPM.official(num_modalities=3, p_exe=1.0, stream=mmfuse.NoiseStream(1))
        opm = made if official else OPM(num_modalities=3, stream=mmfuse.NoiseStream(1))
        opm.set_epoch(7)
        opm(*batch(), **more)
        out = opm(*batch(), **more)
        found.append([out.keep, out.drop_probability, *out.features.values(), opm.q])
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert not bool(found[0][0].all()), "something is dropped"


def test_no_sample_loses_the_last_that_it_has() -> None:
    features, logits, labels = batch()
    present = everyone()
    present["t"][:20] = False  # the weakest, which is never dropped otherwise
    present["v"][:10] = False  # these samples have audio alone
    out = dropping()(features, logits, labels, present=present)
    shown = torch.stack(list(present.values()))
    assert bool((out.keep & shown).any(0).all())
    assert bool(out.keep[0, :10].all())
    assert torch.equal(out.features["a"][:10], features["a"][:10])
    # A sample that would lose both keeps the one with the smaller probability.
    assert not bool(out.keep[0, 10:20].any()) and bool(out.keep[1, 10:20].all())
    assert torch.equal(out.features["v"][10:20], features["v"][10:20])
    assert not bool(out.keep[0, 20:].any())
    assert not bool(out.keep[2, :20].any()), "what is missing is not kept"
    assert bool((out.features["a"][20:] == 0).all())


def test_one_that_is_missing_from_the_batch_is_not_dropped_next() -> None:
    features, logits, labels = batch()
    logits["a"][:] = torch.nan
    opm = dropping()
    out = opm(features, logits, labels, present={**everyone(), "a": ~everyone()["a"]})
    assert opm.q[0] == 0 and opm.q[1] > 0 and opm.q[2] == 0
    assert out.ratios is not None and bool(out.ratios[0].isnan())


def test_numbers_of_ones_own() -> None:
    features, logits, labels = batch()
    prob = mmfuse.ops.modality_scores(list(logits.values()), labels).prob
    want = OPM(num_modalities=3)
    want(features, logits, labels)
    by_scores = OPM(num_modalities=3)
    by_scores(features, scores=dict(zip(NAMES, prob, strict=True)))
    torch.testing.assert_close(by_scores.q, want.q)
    ratios = mmfuse.ops.discrepancy_ratios(prob)
    by_ratios = OPM(num_modalities=3)
    by_ratios(features, ratios=dict(zip(NAMES, ratios, strict=True)))
    torch.testing.assert_close(by_ratios.q, want.q)
    told = OPM(num_modalities=3)
    told(features, coefficients={"a": 0.25, "v": 0.5, "t": float("nan")})
    assert told.q.tolist() == [0.25, 0.5, 0.0]
    with pytest.raises(TypeError, match="got scores and logits; give one"):
        told(features, logits, labels, scores=dict.fromkeys(NAMES, 1.0))


def test_a_criterion_says_how_logits_are_scored() -> None:
    features, logits, _ = batch(2)
    labels = torch.randint(0, 2, (ROWS, 4)).float()
    opm = OPM(criterion=nn.BCEWithLogitsLoss())
    out = opm(features, logits, labels)
    want = mmfuse.ops.modality_scores(list(logits.values()), labels, multilabel=True)
    torch.testing.assert_close(out.scores, want.prob)
    assert not list(opm.parameters()) and "criterion" not in dict(opm.named_modules())


def on_a_rank(rank: int) -> tuple[Tensor, Tensor]:
    features, logits, labels = batch(2)
    present = everyone(2)
    present["a"][:40] = False
    mine = ways.rows_of(rank, 2, ROWS)  # the first rank has no audio
    opm = OPM()
    part = [{n: x[mine] for n, x in values.items()} for values in (features, logits)]
    out = opm(*part, labels[mine], present={n: x[mine] for n, x in present.items()})
    return opm.q, out.scores


def test_ranks_decide_from_all_samples() -> None:
    features, logits, labels = batch(2)
    present = everyone(2)
    present["a"][:40] = False
    opm = OPM()
    out = opm(features, logits, labels, present=present)
    for q, scores in ranks(2).run(on_a_rank):
        torch.testing.assert_close(q, opm.q)
        torch.testing.assert_close(scores, out.scores)
