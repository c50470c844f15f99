"""ARL with samples that lack modalities, and with outputs of other tasks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from ways import bad_masks, some, spoilt, steps_of, two_ranks_find

import mmfuse
from mmfuse.methods._arl_rule import ARLRule

ROWS = 24
FORMS = {"default": mmfuse.ARL, "later": mmfuse.ARL.official}


def batch(count: int, step: int, device: Any = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Logits of other sizes, in float64, and labels."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    found = {}
    for m in range(count):
        z = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
        z[torch.arange(ROWS), labels] += (count - m) * 0.8
        found[f"m{m}"] = z.to(device)
    return found, labels.to(device)


def features_of(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.ones(len(z), 2, dtype=z.dtype, device=z.device) for n, z in logits.items()}


def written(logits: dict[str, Tensor], present: dict[str, Tensor], temperature: float) -> Any:
    """w_m by the equations, pair by pair over the samples that both have; None for nobody."""
    names = list(logits)
    size = {n: z.abs().sum(1) for n, z in logits.items()}
    doubt = {n: -(z.softmax(1) * z.log_softmax(1)).sum(1) for n, z in logits.items()}
    peers = {n: [j for j in names if j != n and (present[n] & present[j]).any()] for n in names}
    who = [n for n in names if peers[n]]

    def share(values: dict[str, Tensor], n: str) -> float:
        ratios = []
        for j in peers[n]:
            both = present[n] & present[j]
            ratios.append(float(values[j][both].mean() / values[n][both].mean()))
        return 1 / (1 + (len(who) - 1) * sum(ratios) / len(ratios))

    v = {n: share(size, n) for n in who}
    h = {n: max(share(doubt, n), 0.6 / len(who)) for n in who}
    total = sum(1 / x for x in h.values())
    strength = {}
    for n in who:
        others = [v[j] for j in who if j != n]
        strength[n] = temperature * sum(others) / len(others) / h[n] / total
    e = {n: math.exp(x) for n, x in strength.items()}
    return [e[n] / sum(e.values()) if n in e else None for n in names]


@pytest.mark.parametrize("count", [2, 3])
def test_pairs_are_compared_over_what_both_have(cell: Cell, count: int) -> None:
    arl = mmfuse.ARL(5.0, num_modalities=count, backend=cell.backend).to(cell.device)
    for step in range(2 if cell.backend == "triton" else 4):
        logits, labels = batch(count, step, cell.device)
        present = some(count, ROWS, step, cell.device)
        if step == 3:
            present["m0"] = torch.zeros_like(present["m0"])
        features = spoilt(features_of(logits), present)
        out = arl(features, spoilt(logits, present), labels, present=present)
        w = written(logits, present, 5.0)
        wanted = [1.0 if x is None else 1 + x for x in w]
        assert out.coefficients.tolist() == pytest.approx(wanted, rel=1e-9)
        sum(f[present[n]].sum() for n, f in out.features.items()).backward()
        for k, (name, f) in zip(wanted, features.items(), strict=True):
            want = k * present[name].double().unsqueeze(1).expand(-1, 2)
            torch.testing.assert_close(f.grad, want, rtol=1e-9, atol=0)
        for m, (name, z) in enumerate(logits.items()):
            p = z.softmax(1).gather(1, labels[:, None])[present[name]].mean()
            torch.testing.assert_close(out.scores[m], p, rtol=1e-9, atol=0, equal_nan=True)
        assert max(wanted) > 1.1 or (count == 2 and step == 3)


def test_missingness_that_is_not_random_fakes_no_dominance() -> None:
    """Equal encoders; audio is missing on the samples of which they are not sure."""
    logits, labels = batch(1, 0)
    both = {"audio": logits["m0"], "visual": logits["m0"].clone()}
    sure = logits["m0"].softmax(1).amax(1) > 0.6
    assert 4 < int(sure.sum()) < ROWS - 4
    present = {"audio": sure, "visual": torch.ones(ROWS, dtype=torch.bool)}
    out = mmfuse.ARL()(features_of(both), both, labels, present=present)
    torch.testing.assert_close(out.weights, torch.full((2,), 0.5, dtype=torch.float64))
    # Means over each one's own samples would see a difference.
    doubt = -(both["audio"].softmax(1) * both["audio"].log_softmax(1)).sum(1)
    assert doubt[sure].mean() < 0.9 * doubt.mean()


@pytest.mark.parametrize("form", FORMS)
def test_a_modality_that_nobody_has_keeps_its_weight_and_has_no_part(form: str) -> None:
    arl = FORMS[form](num_modalities=3, starts=0)
    arl.set_epoch(0)
    logits, labels = batch(3, 0)
    arl(features_of(logits), logits, labels)
    before = arl.weights.clone()
    present = some(3, ROWS, 1)
    present["m1"] = torch.zeros(ROWS, dtype=torch.bool)
    logits, labels = batch(3, 1)
    out = arl(features_of(logits), spoilt(logits, present), labels, present=present)
    assert out.coefficients[1] == 1 and (out.coefficients[[0, 2]] > 1).all()
    assert arl.weights[1] == before[1] and (arl.weights[[0, 2]] != before[[0, 2]]).all()
    for shown in (out.weights, out.scores, out.magnitudes, out.entropies, out.certainties):
        assert shown is not None and bool(shown[1].isnan()) and shown[[0, 2]].isfinite().all()
    # The others are as if there had never been a third.
    two = {n: logits[n] for n in ("m0", "m2")}
    pair = mmfuse.ARL()(features_of(two), two, labels, present={n: present[n] for n in two})
    torch.testing.assert_close(out.weights[[0, 2]], pair.weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["nobody", "nothing shared"])
def test_where_nothing_can_be_compared_nothing_happens(kind: str) -> None:
    arl, (logits, labels) = mmfuse.ARL(), batch(2, 0)
    arl(features_of(logits), logits, labels)
    before, rows = arl.weights.clone(), torch.arange(ROWS)
    present = {"m0": rows < 5, "m1": rows > 7}
    present = present if kind == "nothing shared" else dict.fromkeys(present, rows < 0)
    out = arl(features_of(logits), logits, labels, present=present)
    assert out.coefficients.tolist() == [1.0, 1.0] and torch.equal(arl.weights, before)


def test_what_is_not_finite_scales_nothing() -> None:
    arl, (logits, labels) = mmfuse.ARL(num_modalities=3), batch(3, 0)
    present = some(3, ROWS, 0)
    present["m2"] = torch.zeros(ROWS, dtype=torch.bool)
    logits["m1"][present["m1"].nonzero()[0]] = math.inf
    out = arl(features_of(logits), logits, labels, present=present)
    assert out.coefficients.tolist() == [1.0] * 3
    assert arl.weights.isfinite().all()


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (2.0, 3.0, 5.0)])
def test_tables_of_full_batches_are_means(values: tuple[float, ...]) -> None:
    """Some or all modalities may say nothing."""
    rule, means = ARLRule(4.0), torch.tensor(values, dtype=torch.float64)
    table = means.unsqueeze(1).expand(-1, 3)
    compared = ~torch.eye(3, dtype=torch.bool)
    other = torch.tensor([0.2, 1.0, 0.4], dtype=torch.float64)
    of_other = other.unsqueeze(1).expand(-1, 3)
    for a, b, c, d in ((means, other, table, of_other), (other, means, of_other, table)):
        found = rule.decide_by_pairs(c, d, compared)
        for x, y in zip(found, rule.decide(a, b), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def steps(rank: int, size: int) -> list[Tensor]:
    arl, found = mmfuse.ARL(num_modalities=3), []
    for logits, labels, present in steps_of(rank, size, batch):
        out = arl(features_of(logits), logits, labels, present=present)
        found += [out.coefficients, out.scores, out.weights]
    return [*found, *arl.state_dict().values()]


def test_ranks_that_differ_are_one_batch() -> None:
    whole = two_ranks_find(steps)
    assert whole[6][0] == 1 and (whole[3] != 1).all()


def test_each_of_several_outputs_is_a_yes_or_no() -> None:
    """Entropies are those of σ(z), added up; scores are of the labels."""
    generator = torch.Generator().manual_seed(0)
    logits = {n: torch.randn(8, 5, generator=generator).double() for n in ("m0", "m1")}
    logits["m1"] *= 3
    tags = torch.randint(0, 2, (8, 5), generator=generator).double()
    arl = mmfuse.ARL(criterion=nn.BCEWithLogitsLoss())
    out = arl(features_of(logits), logits, tags)
    means = []
    for z in logits.values():
        p = z.sigmoid()
        means.append(-(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean())
    sizes = torch.stack([z.abs().sum(1).mean() for z in logits.values()])
    w, *_ = ARLRule().decide(sizes, torch.stack(means))
    torch.testing.assert_close(out.weights, w, rtol=1e-9, atol=0)
    want = mmfuse.ops.modality_scores(list(logits.values()), tags, multilabel=True).prob
    torch.testing.assert_close(out.scores, want, rtol=1e-9, atol=0)
    half = {n: torch.arange(8) < 4 for n in logits}
    spoilt_ = spoilt(logits, half)
    some_ = arl(features_of(logits), spoilt_, tags, present=half)
    first = {n: z[:4] for n, z in logits.items()}
    torch.testing.assert_close(some_.weights, arl(features_of(first), first, tags[:4]).weights)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3, 2)])
def test_single_logits_and_places(shape: tuple[int, ...]) -> None:
    logits = {n: (m + 1) * torch.randn(shape).double() for m, n in enumerate(("m0", "m1"))}
    arl = mmfuse.ARL(criterion=nn.BCEWithLogitsLoss())
    found = arl(features_of(logits), logits, torch.randint(0, 2, shape).double())
    flat = {n: z.reshape(8, -1) for n, z in logits.items()}
    tags = torch.zeros_like(flat["m0"])
    torch.testing.assert_close(found.weights, arl(features_of(flat), flat, tags).weights)
    assert found.scores is not None and found.scores.shape == (2,)


@pytest.mark.parametrize(("change", "error", "text"), bad_masks(ROWS))
def test_bad_masks_change_nothing(
    change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    arl, (logits, labels) = mmfuse.ARL(), batch(2, 0)
    before = copy.deepcopy(arl.state_dict())
    with pytest.raises(error, match=text):
        arl(features_of(logits), logits, labels, present={**some(2, ROWS, 0), **change})
    assert all(torch.equal(x, before[name]) for name, x in arl.state_dict().items())
