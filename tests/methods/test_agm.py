"""AGM's formula, its state and its clipping; the authors' numbers are in tests/golden."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cells import Cell
from torch import Tensor, nn
from torch.nn import functional as F
from ways import two_ranks_find

import mmfuse


def responses_of(count: int, device: Any = "cpu", rows: int = 9) -> dict[str, Tensor]:
    return {
        f"m{i}": ((i + 1) * torch.randn(rows, 4, device=device)).requires_grad_()
        for i in range(count)
    }


class Written:
    """The equations on numbers of the host."""

    def __init__(self, count: int, alpha: float, cap: float) -> None:
        self.count, self.alpha, self.cap = count, alpha, cap
        self.seen: list[list[float]] = []

    def ratios(self, scores: list[float]) -> list[float]:
        mean = sum(scores) / self.count
        return [math.exp((mean - s) * self.count / (self.count - 1)) for s in scores]

    def step(self, responses: dict[str, Tensor], labels: Tensor) -> list[float]:
        scores = [float(F.cross_entropy(r.detach().double(), labels)) for r in responses.values()]
        before = [sum(s) / max(len(self.seen), 1) for s in zip(*self.seen, strict=True)]
        usual = self.ratios(before or [0.0] * self.count)
        self.seen.append(scores)
        pairs = zip(usual, self.ratios(scores), strict=True)
        return [math.exp(self.alpha * min(tau - rho, self.cap)) for tau, rho in pairs]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_formula(cell: Cell, count: int) -> None:
    agm = mmfuse.AGM(0.8, 0.3, num_modalities=count, backend=cell.backend).to(cell.device)
    written = Written(count, 0.8, 0.3)
    slowed = capped = 0
    for _ in range(3 if cell.backend == "triton" else 25):
        responses = responses_of(count, cell.device)
        labels = torch.randint(0, 4, (9,), device=cell.device)
        weights = torch.randn(9, 4, device=cell.device)
        k = written.step(responses, labels)
        out = agm(responses, labels)
        # A cross-entropy in float32 is off by some roundings, and rho by exp of these.
        assert out.coefficients.tolist() == pytest.approx(k, rel=1e-5)
        sum((weights * r).sum() for r in out.logits.values()).backward()
        for m, (name, r) in enumerate(responses.items()):
            assert torch.equal(out.logits[name], r)
            torch.testing.assert_close(r.grad, k[m] * weights, rtol=1e-5, atol=0)
        slowed += sum(each < 1 for each in k)
        capped += sum(each == math.exp(0.8 * 0.3) for each in k)
    means = [sum(s) / len(s) for s in zip(*written.seen, strict=True)]
    assert agm.running_scores.diagonal().tolist() == pytest.approx(means, rel=1e-5)
    assert (agm.running_steps == len(written.seen)).all()
    assert slowed and capped


def test_alike_modalities_keep_their_gradients() -> None:
    agm, r = mmfuse.AGM(num_modalities=3), torch.randn(6, 4)
    for _ in range(3):
        out = agm({"a": r, "b": r, "c": r}, torch.arange(6) % 4)
        assert out.ratios.tolist() == out.coefficients.tolist() == [1.0, 1.0, 1.0]


def wrong(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    responses, labels = responses_of(2), torch.arange(9) % 4
    if kind == "no row counts":
        return responses, torch.full_like(labels, -100)
    value = {"NaN": math.nan, "infinite": -math.inf}[kind]
    spoilt = responses["m0"].detach().clone()
    spoilt[0, 0] = value
    return {**responses, "m0": spoilt.requires_grad_()}, labels


@pytest.mark.parametrize("kind", ["NaN", "infinite", "no row counts"])
def test_a_score_that_is_not_finite_is_left_out(kind: str) -> None:
    agm = mmfuse.AGM()
    for _ in range(2):
        agm(responses_of(2), torch.arange(9) % 4)
    before = copy.deepcopy(agm.state_dict())
    out = agm(*wrong(kind))
    assert not out.scores.isfinite().all()
    assert out.coefficients.tolist() == [1.0, 1.0]
    after = agm.state_dict()
    for name in ("running_scores", "running_steps"):
        assert torch.equal(after[name], before[name])


def test_outside_of_the_window_only_the_release_goes_on() -> None:
    default, official = mmfuse.AGM(ends=1), mmfuse.AGM.official(ends=1)
    labels = torch.arange(9) % 4
    for epoch in range(4):
        responses = responses_of(2)
        found = []
        for agm in (default, official):
            agm.set_epoch(epoch)
            found.append(agm(responses, labels).coefficients)
        if epoch == 1:
            torch.testing.assert_close(*found, rtol=1e-5, atol=0)  # scores are float32
            last = found[1]
        if epoch > 1:
            assert found[0].tolist() == [1.0, 1.0] and torch.equal(found[1], last)
            assert last.tolist() != [1.0, 1.0]
    # The running means include all steps.
    assert all((agm.running_steps == 4).all() for agm in (default, official))
    late = mmfuse.AGM.official(starts=1)
    late.set_epoch(0)
    assert late(responses_of(2), labels).coefficients.tolist() == [1.0, 1.0]


def test_the_release_modulates_twenty_epochs() -> None:
    """Its scripts count from 1, and modulate while the epoch is at most 20."""
    agm = mmfuse.AGM.official()
    acting = []
    for epoch in range(25):
        agm.set_epoch(epoch)
        acting.append(agm.modulating)
    assert acting == [True] * 20 + [False] * 5


def test_the_floor_is_that_of_two_modalities() -> None:
    """A sample with probability e⁻⁴⁰ counts as 1e-8 in the release for two."""
    sure = torch.tensor([[0.0, 40.0], [0.0, 0.0]])
    labels = torch.tensor([0, 0])
    third = torch.zeros(2, 2)
    expected = {2: (-math.log(1e-8) + math.log(2)) / 2, 3: (40 + math.log(2)) / 2}
    for count, score in expected.items():
        given = {"a": sure, "b": third, "c": third}
        given = {name: given[name] for name in list(given)[:count]}
        found = mmfuse.AGM.official(num_modalities=count, ends=None)(given, labels).scores
        assert float(found[0]) == pytest.approx(score, rel=1e-6)
        assert float(found[1]) == pytest.approx(math.log(2), rel=1e-6)
    free = mmfuse.AGM.official(floor=0.0, ends=None)({"a": sure, "b": third}, labels).scores
    assert float(free[0]) == pytest.approx(expected[3], rel=1e-6)
    ignored = mmfuse.AGM.official(ends=None)(
        {"a": sure, "b": third}, torch.tensor([-100, 0])
    ).scores
    assert ignored.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)


def test_in_evaluation_it_passes_and_looks_at_nothing() -> None:
    agm = mmfuse.AGM.official().eval()
    before = copy.deepcopy(agm.state_dict())
    responses = responses_of(2)
    out = agm(responses)
    assert out.logits == responses and out.scores is None
    assert out.coefficients.tolist() == [1.0, 1.0]
    assert all(torch.equal(agm.state_dict()[name], x) for name, x in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_means_stay_wide_whatever_the_module_is_cast_to(dtype: torch.dtype) -> None:
    plain, cast = mmfuse.AGM(), mmfuse.AGM()
    labels = torch.arange(9) % 4
    for i in range(4):
        if i == 2:
            cast.to(dtype)
        responses = responses_of(2)
        for agm in (plain, cast):
            agm(responses, labels)
    assert cast.running_scores.dtype == cast.coefficients.dtype == torch.float64
    assert torch.equal(cast.running_scores, plain.running_scores)
    assert cast.running_scores.all() and (cast.coefficients != 1).all()
    cast.reset_parameters()
    assert cast.running_scores.dtype == cast.coefficients.dtype == torch.float64
    assert not cast.running_scores.any() and not cast.running_steps.any()
    assert (cast.coefficients == 1).all()


def norm(parameters: list[Tensor]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("largest", [0.9, -0.9, 1.1, -1.1])
def test_clipping(count: int, largest: float) -> None:
    limit = {2: 1.0, 3: 5.0}[count]
    net, head = nn.Linear(7, 5), nn.Linear(5, 3)
    parameters = [*net.parameters(), *head.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    net.weight.grad.mul_(20)  # the norm is beyond the limit in any case
    head.weight.grad.mul_(limit * abs(largest) / head.weight.grad.abs().max())
    head.weight.grad[0, 0] = limit * largest
    before = [p.grad.clone() for p in parameters]
    clipped = mmfuse.AGM(num_modalities=count).clip_(parameters, head.weight)
    assert clipped.shape == () and bool(clipped) == (abs(largest) > 1)
    if not clipped:
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
        return
    assert norm(parameters) == pytest.approx(limit, rel=1e-5)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad / p.grad.norm(), g / g.norm(), rtol=1e-5, atol=1e-6)


def test_a_norm_within_the_limit_is_left_alone() -> None:
    head = nn.Linear(1, 1, bias=False)
    head.weight.grad = torch.full((1, 1), 2.0)
    other = nn.Parameter(torch.ones(2))  # without a gradient
    assert mmfuse.AGM().clip_([head.weight, other], head.weight, limit=1.5)
    assert float(head.weight.grad) == pytest.approx(1.5, rel=1e-5)
    assert not mmfuse.AGM().clip_([head.weight], head.weight, limit=1.5)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be a finite number of at least 0, got -1.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be a finite number"),
        ({"cap": -0.5}, ValueError, "cap must be a finite number of at least 0 or None"),
        ({"cap": math.inf}, ValueError, "cap must be a finite number of at least 0 or None"),
        ({"num_modalities": 1}, ValueError, "num_modalities must be at least 2"),
        ({"starts": 2, "ends": 1}, ValueError, "ends=1 is before starts=2"),
        ({"process_group": 3}, TypeError, "process_group must be"),
        ({"criterion": "ce"}, TypeError, "criterion must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mmfuse.AGM(**options)


def test_a_bad_floor() -> None:
    with pytest.raises(ValueError, match="floor must be a probability below 1, got"):
        mmfuse.AGM.official(floor=1.5)


def test_bad_arguments_change_nothing() -> None:
    agm = mmfuse.AGM()
    agm(responses_of(2), torch.arange(9) % 4)
    before, labels = copy.deepcopy(agm.state_dict()), torch.arange(9) % 4
    for logits, given, error, text in [
        (list(responses_of(2).values()), labels, TypeError, "logits must map names .* got list"),
        (responses_of(3), labels, ValueError, r"num_modalities=2, but logits has \['m0', 'm1', "),
        (responses_of(2), None, TypeError, r"AGM needs labels in training; call eval\(\)"),
        (responses_of(2), labels[:3], ValueError, r"logits\['m0'\] has 9 rows, labels 3"),
        (responses_of(2), labels + 7, ValueError, r"out of range for logits\['m0'\]"),
    ]:
        with pytest.raises(error, match=text):
            agm(logits, given)
        assert all(torch.equal(agm.state_dict()[name], x) for name, x in before.items())
    with pytest.raises(ValueError, match=r"num_modalities=2, but logits has \['m0'"):
        agm.eval()(responses_of(3))


def test_it_stays_outside_of_checkpointed_parts() -> None:
    from torch.utils.checkpoint import checkpoint

    agm, labels = mmfuse.AGM(), torch.arange(9) % 4

    def part(a: Tensor, b: Tensor) -> Tensor:
        return sum(agm({"a": a, "b": b}, labels).logits.values())

    out = checkpoint(part, *responses_of(2).values(), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"AGM is called in a backward pass.* outside of the"):
        out.sum().backward()


def test_bad_clipping() -> None:
    head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="head_weight has no gradient: call clip_ after"):
        mmfuse.AGM().clip_(head.parameters(), head.weight)
    head.weight.grad = torch.ones(2, 2)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be positive"):
            mmfuse.AGM().clip_(head.parameters(), head.weight, limit)


def scored(rank: int, size: int) -> list[Tensor]:
    """Steps from scores of the user's own, of other weights on each rank."""
    agm, found = mmfuse.AGM(0.8, num_modalities=3), []
    for step in range(3):
        each = torch.tensor([[0.8, 0.2, 0.4], [0.4, 0.3, 0.4]], dtype=torch.float64) + 0.1 * step
        each[:, 2] = torch.nan if step == 1 else each[:, 2]
        weight = torch.tensor([3.0, 1.0], dtype=torch.float64)
        mean = ((each.log() * weight.unsqueeze(1)).sum(0) / weight.sum()).exp()
        mine, count = (mean, 4.0) if size == 1 else (each[rank], float(weight[rank]))
        responses = {f"m{m}": torch.ones(2, 1).requires_grad_() for m in range(3)}
        out = agm(responses, scores=dict(zip(responses, mine, strict=True)), count=count)
        found += [out.coefficients, out.scores, out.ratios]
    return [*found, *agm.state_dict().values()]


def test_scores_of_ones_own() -> None:
    """They act as logits whose true classes have these probabilities, averaged over ranks."""
    whole = two_ranks_find(scored)
    assert whole[3][2] == 1 and (whole[0] != 1).all()
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    responses = {name: row.log().expand(5, 2) for name, row in zip(("m0", "m1"), p, strict=True)}
    want = mmfuse.AGM()(responses, torch.zeros(5, dtype=torch.int64))
    out = mmfuse.AGM()(responses, scores={"m0": 0.7, "m1": torch.tensor(0.2)})
    torch.testing.assert_close(out.coefficients, want.coefficients)
    torch.testing.assert_close(out.scores, want.scores)


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({"scores": {"m0": 1.0}}, ValueError, r"scores .* missing \['m1'\]"),
        ({"scores": {"m0": 1.0, "m1": -1.0}}, ValueError, r"scores\['m1'\] must be positive"),
        ({"count": 2.0, "labels": torch.zeros(5).long()}, TypeError, "count goes with scores"),
        (
            {"scores": {"m0": 1.0, "m1": 1.0}, "labels": torch.zeros(5).long()},
            TypeError,
            "AGM got scores and labels; give one of them",
        ),
        (
            {
                "scores": {"m0": 1.0, "m1": 1.0},
                "present": dict.fromkeys(("m0", "m1"), torch.ones(5, dtype=torch.bool)),
            },
            TypeError,
            "present goes with logits",
        ),
    ],
)
def test_wrong_scores_change_nothing(
    more: dict[str, Any], error: type[Exception], text: str
) -> None:
    agm, responses = mmfuse.AGM(), {name: torch.randn(5, 2) for name in ("m0", "m1")}
    with pytest.raises(error, match=text):
        agm(responses, **more)
    assert not agm.running_steps.any()
