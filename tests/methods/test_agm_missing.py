"""AGM with samples that lack modalities."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor
from torch.nn import functional as F
from ways import bad_masks, some, spoilt, steps_of, two_ranks_find

import mmfuse

ROWS = 24
FORMS = {"default": mmfuse.AGM, "official": mmfuse.AGM.official}


def batch(count: int, step: int, device: Any = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Responses of which the first are ahead, in float64, and labels."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    found = {}
    for i in range(count):
        z = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
        z[torch.arange(ROWS), labels] += (count - i) * 0.8 + 0.1 * step
        found[f"m{i}"] = z.to(device).requires_grad_()
    return found, labels.to(device)


class Written:
    """The equations on numbers of the host, pair by pair over the samples that both have."""

    def __init__(self, count: int, alpha: float, cap: float) -> None:
        self.count, self.alpha, self.cap = count, alpha, cap
        self.seen: dict[tuple[int, int], list[float]] = {}

    def step(
        self, responses: dict[str, Tensor], labels: Tensor, present: dict[str, Tensor]
    ) -> list[float]:
        losses = [F.cross_entropy(z.detach(), labels, reduction="none") for z in responses.values()]
        here = list(present.values())
        every = range(self.count)
        now: dict[tuple[int, int], float] = {}
        for m in every:
            for j in every:
                both = here[m] & here[j]
                if both.any():
                    now[m, j] = float(losses[m][both].mean())
        k = []
        for m in every:
            others = [j for j in every if j != m and (m, j) in now]
            if not others:
                k.append(1.0)
                continue
            lead = sum(now[j, m] - now[m, j] for j in others) / len(others)
            usual = sum(self.mean(j, m) - self.mean(m, j) for j in others) / len(others)
            k.append(math.exp(self.alpha * min(math.exp(usual) - math.exp(lead), self.cap)))
        for pair, value in now.items():
            self.seen.setdefault(pair, []).append(value)
        return k

    def mean(self, m: int, j: int) -> float:
        values = self.seen.get((m, j), [0.0])
        return sum(values) / len(values)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3])
def test_with_all_present_nothing_changes(count: int, form: str) -> None:
    plain, told = (FORMS[form](0.8, 0.5, num_modalities=count, ends=None) for _ in range(2))
    for step in range(4):
        responses, labels = batch(count, step)
        want = plain(responses, labels)
        everyone = {name: torch.ones(ROWS, dtype=torch.bool) for name in responses}
        out = told(responses, labels, present=everyone)
        for field in ("coefficients", "scores", "ratios", "usual_ratios"):
            torch.testing.assert_close(
                getattr(out, field), getattr(want, field), rtol=1e-12, atol=0
            )
    assert (out.coefficients != 1).all()
    for name, x in told.state_dict().items():
        torch.testing.assert_close(x, plain.state_dict()[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_pairs_are_compared_over_what_both_have(cell: Cell, count: int) -> None:
    agm = mmfuse.AGM(0.8, 0.3, num_modalities=count, backend=cell.backend).to(cell.device)
    written = Written(count, 0.8, 0.3)
    apart = 0.0
    for step in range(2 if cell.backend == "triton" else 6):
        responses, labels = batch(count, step, cell.device)
        present = some(count, ROWS, step, cell.device)
        if step == 3:
            present["m0"] = torch.zeros_like(present["m0"])
        given = spoilt(responses, present)
        out = agm(given, labels, present=present)
        k = written.step(responses, labels, present)
        assert out.coefficients.tolist() == pytest.approx(k, rel=1e-9)
        sum(r[present[n]].sum() for n, r in out.logits.items()).backward()
        for m, (name, r) in enumerate(given.items()):
            want = k[m] * present[name].double().unsqueeze(1).expand(-1, 4)
            torch.testing.assert_close(r.grad, want, rtol=1e-9, atol=0)
        apart = max(apart, *(abs(each - 1) for each in k))
        assert (out.coefficients[0] == 1) == (step in (0, 3) and k[0] == 1)
    assert apart > 1e-2
    for (m, j), values in written.seen.items():
        mean = float(agm.running_scores[m, j])
        assert mean == pytest.approx(sum(values) / len(values), rel=1e-9)
        assert int(agm.running_steps[m, j]) == len(values)


@pytest.mark.parametrize("form", FORMS)
def test_a_modality_that_nobody_has_leaves_no_trace(form: str) -> None:
    agm = FORMS[form](0.8, None, num_modalities=3, ends=3)
    agm.set_epoch(0)
    for step in range(2):
        responses, labels = batch(3, step)
        agm(responses, labels, present=some(3, ROWS, step))
    before = copy.deepcopy(agm.state_dict())
    responses, labels = batch(3, 2)
    present = some(3, ROWS, 2)
    present["m1"] = torch.zeros(ROWS, dtype=torch.bool)
    out = agm(spoilt(responses, present), labels, present=present)
    assert out.coefficients[1] == 1 and out.scores[1].isnan() and out.ratios[1].isnan()
    assert out.coefficients.isfinite().all()
    assert out.coefficients[0] != 1 and out.coefficients[2] != 1
    after = agm.state_dict()
    assert all(x.isfinite().all() for x in after.values())
    for name in ("running_scores", "running_steps"):
        assert torch.equal(after[name][1], before[name][1])
        assert torch.equal(after[name][:, 1], before[name][:, 1])
        assert not torch.equal(after[name][0, 2], before[name][0, 2])
    assert after["coefficients"][1] == before["coefficients"][1] != 1
    # The others are as if there had never been a third.
    pair = FORMS[form](0.8, None, ends=None, **({"floor": 0.0} if form == "official" else {}))
    two = {name: responses[name] for name in ("m0", "m2")}
    lead = pair(two, labels, present={name: present[name] for name in two}).ratios
    torch.testing.assert_close(out.ratios[[0, 2]], lead, rtol=1e-12, atol=0)
    # After the last epoch the release keeps the last coefficients, but for missing modalities.
    agm.set_epoch(4)
    late = agm(spoilt(responses, present), labels, present=present).coefficients
    last = after["coefficients"] if form == "official" else torch.ones(3, dtype=torch.float64)
    assert late[1] == 1 and torch.equal(late[[0, 2]], last[[0, 2]])


@pytest.mark.parametrize("kind", ["nobody", "nothing shared"])
def test_where_nothing_can_be_compared_nothing_happens(kind: str) -> None:
    agm, (responses, labels) = mmfuse.AGM(), batch(2, 0)
    agm(responses, labels)
    before = copy.deepcopy(agm.state_dict())
    rows = torch.arange(ROWS)
    split = {"m0": rows < 5, "m1": rows > 7}
    present = split if kind == "nothing shared" else dict.fromkeys(split, rows < 0)
    out = agm(responses, labels, present=present)
    assert out.coefficients.tolist() == [1.0, 1.0]
    for name, x in agm.state_dict().items():
        away = x - before[name]
        if kind == "nothing shared" and name.startswith("running"):  # each has its own score
            assert (away.diagonal() != 0).all()
            away = away - away.diag().diag()
        assert not away.any()


def test_a_score_that_is_not_finite_is_left_out() -> None:
    agm = mmfuse.AGM(num_modalities=3)
    agm(*batch(3, 0))
    before = copy.deepcopy(agm.state_dict())
    responses, labels = batch(3, 1)
    present = some(3, ROWS, 1)
    wrong = responses["m2"].detach().clone()
    wrong[present["m2"].nonzero()[0]] = math.nan
    out = agm({**responses, "m2": wrong}, labels, present=present)
    assert out.coefficients.tolist() == [1.0, 1.0, 1.0]
    for name in ("running_scores", "running_steps"):
        assert torch.equal(agm.state_dict()[name], before[name])


def steps(rank: int, size: int) -> list[Tensor]:
    agm, found = mmfuse.AGM(0.8, num_modalities=3), []
    for responses, labels, present in steps_of(rank, size, batch):
        out = agm(responses, labels, present=present)
        found += [out.coefficients, out.scores, out.ratios]
    return [*found, *agm.state_dict().values()]


def test_ranks_that_differ_are_one_batch() -> None:
    whole = two_ranks_find(steps)
    assert whole[6][0] == 1 and (whole[3] != 1).all()


@pytest.mark.parametrize(("change", "error", "text"), bad_masks(ROWS))
def test_bad_masks_change_nothing(
    change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    agm, (responses, labels) = mmfuse.AGM(), batch(2, 0)
    before = copy.deepcopy(agm.state_dict())
    with pytest.raises(error, match=text):
        agm(responses, labels, present={**some(2, ROWS, 0), **change})
    assert all(torch.equal(x, before[name]) for name, x in agm.state_dict().items())
