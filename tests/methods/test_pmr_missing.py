"""PMR with samples that lack modalities."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from states import differences
from torch import Tensor, nn
from ways import Masks, bad_masks, some, spoilt, steps_of, two_ranks_find

import mmfuse
from mmfuse.methods._pmr_rule import PMRReleased

ROWS, CLASSES = 24, 4
Batch = tuple[dict[str, Tensor], Tensor]
FORMS = {"default": mmfuse.PMR, "official": mmfuse.PMR.official}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def batch(count: int, seed: int) -> Batch:
    """Features of which the first say more about the class than the last; widths differ."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ROWS) % CLASSES
    features = {}
    for m in range(count):
        x = torch.randn(ROWS, 3 + m, generator=generator, dtype=torch.float64)
        x[:, 0] += labels * (1.5 / (1 + m))
        features[f"m{m}"] = x.requires_grad_()
    return features, labels


def ready(count: int, form: str = "default", **options: Any) -> mmfuse.PMR:
    pmr = FORMS[form](1.0, 0.5, num_modalities=count, ends=None, **options)
    pmr.update_prototypes([batch(count, 90)])
    return pmr


def written(features: dict[str, Tensor], labels: Tensor, present: Masks, pmr: Any) -> Any:
    """The equations, sample by sample and pair by pair: the loss, k_m and S_m."""
    names = list(features)
    pi: dict[str, list[Tensor]] = {}
    for name, c in zip(names, pmr.prototypes, strict=True):
        away = (features[name].unsqueeze(1) - c.double()).square().sum(2).sqrt()
        pi[name] = list((-away).softmax(1))
    loss = torch.zeros((), dtype=torch.float64)
    k, scores = [], []

    def mean(m: str, j: str) -> float:
        rows = (present[m] & present[j]).nonzero().flatten().tolist()
        return sum(float(pi[m][i][labels[i]].detach()) for i in rows) / len(rows)

    for m in names:
        mine = present[m].nonzero().flatten().tolist()
        others = [j for j in names if j != m and (present[m] & present[j]).any()]
        scores.append(mean(m, m) if mine else math.nan)
        behind = max((mean(j, m) / mean(m, j) for j in others), default=0.0)
        ahead = max((mean(m, j) / mean(j, m) for j in others), default=0.0)
        released = isinstance(pmr.rule, PMRReleased)
        k.append(float(behind > 1) if released else min(max(behind - 1, 0.0), 1.0))
        for i in mine:
            loss = loss - k[-1] * pi[m][i][labels[i]].log() / len(mine)
            entropy = -(pi[m][i] * pi[m][i].log()).sum()
            loss = loss - pmr.rule.mu * min(max(ahead - 1, 0.0), 1.0) * entropy / len(mine)
    return loss, k, scores


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3])
def test_with_all_present_nothing_changes(count: int, form: str) -> None:
    plain, told = ready(count, form), ready(count, form)
    everyone = {f"m{m}": torch.ones(ROWS, dtype=torch.bool) for m in range(count)}
    for step in range(2):
        features, labels = batch(count, step)
        plain.update_prototypes([(features, labels)])
        told.update_prototypes([(features, labels, everyone)])
        found = []
        for out in (plain(features, labels), told(features, labels, present=everyone)):
            grads = torch.autograd.grad(out.loss, list(features.values()))
            found.append([out.loss, out.coefficients, out.scores, out.ratios, *grads])
            found[-1] += [out.prototype_losses, out.entropies]
        torch.testing.assert_close(*found, **CLOSE)
    assert (found[0][1] > 0).any()
    assert differences(dict(told.state_dict()), dict(plain.state_dict())) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("gone", [False, True])
def test_pairs_are_compared_over_what_both_have(count: int, form: str, gone: bool) -> None:
    pmr, drawn = ready(count, form), 0
    for step in range(3):
        features, labels = batch(count, step)
        present = some(count, ROWS, step)
        if gone:
            present["m1"] = torch.zeros(ROWS, dtype=torch.bool)
        loss, k, scores = written(features, labels, present, pmr)
        given = spoilt(features, present)
        out = pmr(given, labels, present=present)
        torch.testing.assert_close(out.loss, loss, **CLOSE)
        assert out.coefficients.tolist() == pytest.approx(k, rel=1e-9)
        assert out.scores.tolist() == pytest.approx(scores, rel=1e-9, nan_ok=True)
        if loss.requires_grad:
            want = torch.autograd.grad(loss, list(features.values()), allow_unused=True)
            got = torch.autograd.grad(out.loss, list(given.values()))
            for name, x, y in zip(given, got, want, strict=True):
                assert not x[~present[name]].any()
                zero = torch.zeros_like(x) if y is None else y
                torch.testing.assert_close(x, zero, **CLOSE)
        drawn += sum(each > 0 for each in k)
    assert out.coefficients[1] == 0 or not gone
    assert drawn or (gone and count == 2)


@pytest.mark.parametrize("form", FORMS)
def test_prototypes_are_means_of_what_is_there(form: str) -> None:
    pmr = ready(2, form, momentum=0.25)
    before = [c.clone() for c in pmr.prototypes]
    first, second = batch(2, 1), batch(2, 2)
    masked = some(2, ROWS, 1)
    masked["m1"] = torch.zeros(ROWS, dtype=torch.bool)
    pmr.update_prototypes([(spoilt(first[0], masked), first[1], masked)])
    assert torch.equal(pmr.prototypes[1], before[1])
    rows = first[0]["m0"].detach()
    for c in range(CLASSES):
        mine = masked["m0"] & (first[1] == c)
        want = 0.25 * before[0][c].double() + 0.75 * rows[mine].mean(0)
        torch.testing.assert_close(pmr.prototypes[0][c].double(), want, rtol=1e-6, atol=1e-6)
    # A batch with masks and one without add up.
    pmr.update_prototypes([(spoilt(first[0], masked), first[1], masked), second])
    torch.testing.assert_close(
        pmr.prototypes[1].double(),
        0.25 * before[1].double()
        + 0.75
        * torch.stack([second[0]["m1"].detach()[second[1] == c].mean(0) for c in range(CLASSES)]),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_modality_without_prototypes_has_no_part_until_it_has_some(form: str) -> None:
    pmr, (features, labels) = FORMS[form](1.0, 0.5, num_modalities=3, ends=None), batch(3, 0)
    everyone = {name: torch.ones(ROWS, dtype=torch.bool) for name in features}
    without = {**everyone, "m2": torch.zeros(ROWS, dtype=torch.bool)}
    pmr.update_prototypes([(features, labels, without)])
    assert pmr.prototypes[2].isnan().all() and pmr.prototypes[2].shape == (CLASSES, 5)
    out = pmr(features, labels, present=everyone)
    assert out.coefficients[2] == 0 and (out.coefficients[:2] > 0).any()
    grads = torch.autograd.grad(out.loss, list(features.values()))
    assert all(g.isfinite().all() for g in grads) and not grads[2].any()
    pmr.update_prototypes([(features, labels, everyone)])
    assert pmr.prototypes[2].isfinite().all()
    assert pmr(features, labels, present=everyone).coefficients[2] > 0


def test_a_class_without_a_prototype_is_missing_in_its_modality_alone() -> None:
    pmr, (features, labels) = mmfuse.PMR(1.0, 0.5), batch(2, 0)
    known = {"m0": torch.ones(ROWS, dtype=torch.bool), "m1": labels != 2}
    pmr.update_prototypes([(features, labels, known)])
    everyone = {name: torch.ones(ROWS, dtype=torch.bool) for name in features}
    out, want = (pmr(features, labels, present=p) for p in (everyone, known))
    for field in ("loss", "coefficients", "scores", "prototype_losses"):
        assert torch.equal(getattr(out, field), getattr(want, field))
    # Rows of no class count for nobody, and one out of range is refused.
    ignored = labels.masked_fill(labels == 1, -100)
    assert pmr(features, ignored, present=everyone).scores.isfinite().all()
    with pytest.raises(ValueError, match="out of range"):
        pmr(features, labels + 3, present=everyone)


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_can_be_compared_nothing_is_added(form: str) -> None:
    pmr, (features, labels) = ready(2, form), batch(2, 0)
    rows = torch.arange(ROWS)
    for present in (
        {"m0": rows < 5, "m1": rows > 7},
        {"m0": rows < 0, "m1": rows < 0},
    ):
        out = pmr(features, labels, present=present)
        assert out.loss == 0 and not out.coefficients.any()
        for grad in torch.autograd.grad(out.loss, list(features.values())):
            assert not grad.any()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict({f"m{m}": nn.Linear(3 + m, 5) for m in range(3)})
        self.double()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: net(inputs[name]) for name, net in self.encoders.items()}


def decided(rank: int, size: int) -> list[Tensor]:
    net, pmr, found = Net(), mmfuse.PMR(1.0, 0.5, num_modalities=3), []
    for inputs, labels, present in steps_of(rank, size, batch):
        with torch.no_grad():
            pmr.update_prototypes([(net(inputs), labels, present)])
        out = pmr(net(inputs), labels, present=present)
        grads = torch.autograd.grad(out.loss, list(net.parameters()))
        assert all(g.isfinite().all() for g in grads)
        found += [out.coefficients, out.scores, out.ratios, *(c.clone() for c in pmr.prototypes)]
    return found


def test_ranks_that_differ_are_one_batch() -> None:
    whole = two_ranks_find(decided)
    assert whole[12][0] == 0 and torch.equal(whole[15], whole[9])
    assert any(each.any() for each in whole[::6])


@pytest.mark.parametrize(("change", "error", "text"), bad_masks(ROWS))
def test_bad_masks_change_nothing(
    change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    pmr, (features, labels) = ready(2), batch(2, 0)
    before = copy.deepcopy(dict(pmr.state_dict()))
    bad = {**some(2, ROWS, 0), **change}
    with pytest.raises(error, match=text):
        pmr(features, labels, present=bad)
    with pytest.raises(error, match=text):
        pmr.update_prototypes([(features, labels, bad)])
    assert differences(dict(pmr.state_dict()), before) == []
