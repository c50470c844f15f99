"""Numbers of the user's own in place of logits, and targets of other losses than cross-entropy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from balancing import ANCHORED, STEPPING, acted, make, start
from ranks import ranks
from torch import Tensor, nn
from torch.nn import functional as F

import mmfuse

NAMES = ("audio", "visual", "text")
_TWO = {name: nn.Linear(1, 1) for name in ("audio", "visual")}
#: The kinds of numbers, by the field that a step returns.
HAVE_RATIOS = [
    kind
    for kind in STEPPING
    if "ratios" in {field.name for field in fields(make(kind, _TWO).rule.result)}
]


def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {n: nn.Linear(3, 5, dtype=torch.float64) for n in NAMES}


def ready(kind: str, **options: Any) -> tuple[Any, dict[str, nn.Module]]:
    """A method with gradients to act on; anchored ones have moved away from their anchors."""
    nets = encoders()
    method = make(kind, nets, **options)
    if kind in ANCHORED:
        start(method)
        with torch.no_grad():
            for net in nets.values():
                for p in net.parameters():
                    p.add_(torch.randn_like(p))
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    return method, nets


def more_of(method: Any, nets: dict[str, nn.Module]) -> dict[str, Any]:
    torch.manual_seed(4)
    inputs = {n: torch.randn(8, 3, dtype=torch.float64) for n in NAMES}
    features = {n: nets[n](x).detach() for n, x in inputs.items()}
    every = {"features": features, "inputs": inputs}
    return {name: every[name] for name in method.rule.need.inputs}


@pytest.mark.parametrize("kind", STEPPING)
def test_scores_of_ones_own_are_as_those_of_logits(kind: str) -> None:
    """One row, so that its probability is the mean, and its logarithm the mean logarithm."""
    z = {
        n: torch.randn(1, 4, dtype=torch.float64) + torch.tensor([s, 0, 0, 0])
        for n, s in zip(NAMES, (4, 1, 0), strict=True)
    }
    found = []
    for own in (True, False):
        method, nets = ready(kind)
        more = more_of(method, nets)
        labels = torch.zeros(1, dtype=torch.int64)
        if own:
            p = {n: x.softmax(1)[0, 0] for n, x in z.items()}
            if method.rule.need.accuracy:  # a score is positive
                p = {n: (x.argmax() == 0).double().clamp(min=1e-300) for n, x in z.items()}
            out = method.step(scores=p, labels=labels, **more)
        else:
            out = method.step(z, labels, **more)
        found.append(
            [out.coefficients.double(), *(p.grad for e in nets.values() for p in e.parameters())]
        )
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert acted(method, [out])


@pytest.mark.parametrize("kind", HAVE_RATIOS)
def test_ratios_go_on_from_where_scores_lead(kind: str) -> None:
    p = dict(zip(NAMES, (0.8, 0.4, 0.2), strict=True))
    from_scores = ready(kind)[0].step(scores=p)
    ratios = dict(zip(NAMES, from_scores.ratios.unbind(), strict=True))
    from_ratios = ready(kind)[0].step(ratios=ratios)
    torch.testing.assert_close(from_ratios.coefficients, from_scores.coefficients)
    assert from_ratios.scores.isnan().all()


@pytest.mark.parametrize("kind", STEPPING)
def test_coefficients_are_taken_as_they_are(kind: str) -> None:
    method, nets = ready(kind)
    idle = method.rule.need.neutral
    k = {"audio": 0.25, "visual": torch.tensor(0.5), "text": float("nan")}
    out = method.step(coefficients=k)
    assert out.coefficients.tolist() == [0.25, 0.5, idle]
    without, same = ready(kind)
    without.step(coefficients=dict.fromkeys(NAMES, float("nan")))
    for name, changed in (("audio", True), ("visual", True), ("text", False)):
        pairs = zip(nets[name].parameters(), same[name].parameters(), strict=True)
        assert any(not torch.equal(a.grad, b.grad) for a, b in pairs) == changed


@pytest.mark.parametrize("kind", [k for k in STEPPING if k not in HAVE_RATIOS])
def test_a_method_without_ratios_says_so(kind: str) -> None:
    method, _ = ready(kind)
    with pytest.raises(TypeError, match="has no ratios; give scores, or coefficients"):
        method.step(ratios=dict.fromkeys(NAMES, 1.0))


def test_outside_of_its_epochs_nothing_is_done() -> None:
    method, nets = ready("OGM", starts=3)
    method.set_epoch(0)
    before = [p.grad.clone() for p in nets["audio"].parameters()]
    out = method.step(coefficients=dict.fromkeys(NAMES, 0.5))
    assert out.coefficients.tolist() == [1, 1, 1]
    assert all(
        torch.equal(p.grad, b) for p, b in zip(nets["audio"].parameters(), before, strict=True)
    )


def test_micro_batches_are_averaged_by_their_count() -> None:
    method, _ = ready("OGM")
    method.observe(scores={"audio": 0.2, "visual": 0.5, "text": float("nan")}, count=3)
    out = method.step(scores={"audio": 0.6, "visual": 0.1, "text": 0.4}, count=1)
    torch.testing.assert_close(out.scores, torch.tensor([0.3, 0.4, 0.4]).double())
    table = {("audio", "text"): 0.6 / 0.4, ("audio", "visual"): 0.3 / 0.4}
    assert out.ratios[0].item() == pytest.approx(sum(table.values()) / 2)


@pytest.mark.parametrize("kind", HAVE_RATIOS)
@pytest.mark.parametrize("what", ["ratios", "coefficients"])
def test_a_modality_that_one_micro_batch_is_without_counts_by_the_others(
    kind: str, what: str
) -> None:
    method, _ = ready(kind)
    method.observe(**{what: {"audio": 0.5, "visual": float("nan"), "text": 0.3}})
    out = method.step(**{what: {"audio": 0.7, "visual": 0.2, "text": float("nan")}}, count=3)
    found = getattr(out, what).double()
    torch.testing.assert_close(found, torch.tensor([0.65, 0.2, 0.3]).double())


def coefficients_on(rank: int) -> Tensor:
    method, _ = ready("OGM")
    own = {"audio": 0.2 + 0.4 * rank, "visual": 0.5, "text": float("nan") if rank else 0.4}
    return method.step(coefficients=own).coefficients


def test_a_modality_that_one_rank_is_without_counts_by_the_others() -> None:
    for found in ranks(2).run(coefficients_on):
        torch.testing.assert_close(found.double(), torch.tensor([0.4, 0.5, 0.4]).double())


def score_on(rank: int) -> Tensor:
    method, _ = ready("OGM")
    own = {"audio": 0.2 + 0.4 * rank, "visual": 0.5, "text": float("nan") if rank else 0.4}
    return method.step(scores=own, count=3 - 2 * rank).scores


def test_ranks_are_averaged_by_their_count() -> None:
    for found in ranks(2).run(score_on):
        torch.testing.assert_close(found, torch.tensor([0.3, 0.5, 0.4]).double())


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": (
        {"scores": {**dict.fromkeys(NAMES, 1.0), "text": -1.0}},
        ValueError,
        r"scores\['text'\] must be positive",
    ),
    "infinite": (
        {"coefficients": dict.fromkeys(NAMES, float("inf"))},
        ValueError,
        "must be finite",
    ),
    "many": (
        {"scores": dict.fromkeys(NAMES, torch.ones(2))},
        TypeError,
        "must be one number, got torch.float32 .2.",
    ),
    "text": ({"scores": dict.fromkeys(NAMES, "1")}, TypeError, "got str"),
    "names": ({"scores": {"audio": 1.0, "visual": 1.0}}, ValueError, "missing"),
    "two kinds": (
        {"scores": dict.fromkeys(NAMES, 1.0), "ratios": dict.fromkeys(NAMES, 1.0)},
        TypeError,
        "got scores and ratios; give one",
    ),
    "logits too": (
        {"scores": dict.fromkeys(NAMES, 1.0), "logits": {}, "labels": torch.zeros(1)},
        TypeError,
        "got scores and logits",
    ),
    "count alone": (
        {"logits": {}, "labels": torch.zeros(1), "count": 1},
        TypeError,
        "count goes with",
    ),
    "count": (
        {"scores": dict.fromkeys(NAMES, 1.0), "count": -1},
        ValueError,
        "count must be at least 0",
    ),
    "unknown": (
        {"score": dict.fromkeys(NAMES, 1.0)},
        TypeError,
        r"unexpected arguments: \['score'\]",
    ),
    "masks": (
        {"scores": dict.fromkeys(NAMES, 1.0), "present": {}},
        TypeError,
        "present goes with logits",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_named_before_anything_changes(name: str) -> None:
    given, error, message = WRONG[name]
    method, nets = ready("OGM")
    before = [p.grad.clone() for net in nets.values() for p in net.parameters()]
    with pytest.raises(error, match=message):
        method.step(**given)
    after = [p.grad for net in nets.values() for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    method.step(scores=dict.fromkeys(NAMES, 1.0))


TASKS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "weights and ignored rows": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 0.5]).double(), ignore_index=255),
        (9, 4),
        lambda: torch.tensor([0, 1, 2, 3, 255, 1, 1, 0, 2]),
    ),
    "segmentation": (nn.CrossEntropyLoss(), (3, 4, 5, 2), lambda: torch.randint(0, 4, (3, 5, 2))),
    "soft labels": (nn.CrossEntropyLoss(), (9, 4), lambda: torch.rand(9, 4).double().softmax(1)),
    "several labels": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0, 0.5]).double()),
        (9, 4),
        lambda: torch.randint(0, 2, (9, 4)).double(),
    ),
    "one logit": (nn.BCEWithLogitsLoss(), (9, 1), lambda: torch.randint(0, 2, (9, 1)).double()),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", STEPPING)
def test_a_method_scores_what_its_criterion_is_for(kind: str, task: str) -> None:
    """The scores are the op's, with one micro-batch, with two, and with everybody present."""
    criterion, shape, target = TASKS[task]
    torch.manual_seed(2)
    z = {n: torch.randn(shape, dtype=torch.float64) for n in NAMES}
    labels = target()
    keywords: dict[str, Any] = {"weight": criterion.weight}
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        keywords |= {"multilabel": True, "pos_weight": criterion.pos_weight}
    else:
        keywords |= {"ignore_index": criterion.ignore_index}
    want = mmfuse.ops.modality_scores(list(z.values()), labels, **keywords)
    everyone = {n: torch.ones(len(labels), dtype=torch.bool) for n in NAMES}
    for more in ({}, {"present": everyone}):
        for cut in (0, 2):
            method, nets = ready(kind, criterion=criterion)
            needed = more_of(method, nets)
            for rows in [slice(0, cut), slice(cut, None)] if cut else [slice(None)]:
                part = {n: x[rows] for n, x in z.items()}
                shown = {
                    k: {n: x[rows] for n, x in v.items()} for k, v in {**more, **needed}.items()
                }
                if "features" in shown and len(labels) != 8:
                    shown |= _rows(needed, len(part["audio"]))
                method.observe(part, labels[rows], **shown)
            out = method.step()
            mine = want.log_prob if kind == "InfoReg" else want.prob
            if method.rule.need.accuracy:
                mine = _accuracies(list(z.values()), labels, keywords)
            torch.testing.assert_close(out.scores.double(), mine.double(), rtol=1e-9, atol=1e-12)


def _accuracies(logits: list[Tensor], labels: Tensor, keywords: dict[str, Any]) -> Tensor:
    """A modality's accuracy, by the rows' weights; of several labels, the share of right ones."""
    if keywords.get("multilabel"):
        return torch.stack([((z > 0) == (labels > 0.5)).double().mean() for z in logits])
    weight = mmfuse.ops.sample_scores(logits, labels, **keywords).weight
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    right = torch.stack([z.argmax(1) == classes for z in logits])
    return (right * weight).flatten(1).sum(1) / weight.sum()


def _rows(needed: dict[str, dict[str, Tensor]], rows: int) -> dict[str, Any]:
    return {k: {n: x[:rows].repeat(2, 1)[:rows] for n, x in v.items()} for k, v in needed.items()}


def test_no_other_criterion_is_guessed_at() -> None:
    with pytest.raises(TypeError, match=r"criterion must be nn.CrossEntropyLoss.*give scores="):
        mmfuse.OGM(encoders(), criterion=nn.MSELoss())


def test_another_frameworks_ratio_takes_a_few_lines() -> None:
    """BalanceMM's OGM for three modalities: S_m / min S, and 1 − tanh(0.01·ratio) above 1."""
    method, nets = ready("OGM")
    torch.manual_seed(6)
    z = {n: torch.randn(8, 4, dtype=torch.float64) for n in NAMES}
    labels = torch.randint(0, 4, (8,))
    before = {n: [p.grad.clone() for p in net.parameters()] for n, net in nets.items()}

    s = dict(zip(NAMES, mmfuse.ops.modality_scores(list(z.values()), labels).prob, strict=True))
    least = torch.stack(list(s.values())).min()
    ratios = {n: x / least for n, x in s.items()}
    k = {n: torch.where(r > 1, 1 - torch.tanh(0.01 * r), 1.0) for n, r in ratios.items()}
    method.step(coefficients=k)

    for name, net in nets.items():
        p = z[name].softmax(1).gather(1, labels.unsqueeze(1)).sum()
        others = min(x.softmax(1).gather(1, labels.unsqueeze(1)).sum() for x in z.values())
        factor = 1 - torch.tanh(0.01 * p / others) if p > others else 1.0
        for q, old in zip(net.parameters(), before[name], strict=True):
            torch.testing.assert_close(q.grad, factor * old)


def test_the_loss_of_a_criterion_and_its_score_agree() -> None:
    """With log scores everywhere, the weighted mean score is minus PyTorch's loss."""
    criterion, shape, target = TASKS["weights and ignored rows"]
    torch.manual_seed(2)
    z = torch.randn(shape, dtype=torch.float64)
    labels = target()
    found = mmfuse.ops.modality_scores([z], labels, weight=criterion.weight, ignore_index=255)
    loss = F.cross_entropy(z, labels, weight=criterion.weight, ignore_index=255)
    torch.testing.assert_close(found.log_prob[0], -loss)
