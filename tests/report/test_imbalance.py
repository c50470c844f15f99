"""The numbers of a report against the same ones computed in another way."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

# A machine that runs the tests of a GPU may have none of them.
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")

import torch
import torchmetrics
from reported import Added, Fused, batched, same, samples, state_of
from sklearn import metrics
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mmfuse
from mmfuse import NoiseStream, imbalance_report

NAMES = ("audio", "visual", "text")


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float(metrics.accuracy_score(labels, outputs.argmax(1)))


def test_a_modality_that_the_model_ignores_has_no_share() -> None:
    inputs, labels = samples(NAMES[:2])
    report = imbalance_report(Added(audio=1.0, visual=0.0), batched(inputs, labels))
    right = accuracy(inputs["audio"], labels)
    none = accuracy(torch.zeros(len(labels), 3), labels)
    assert report.joint.value == pytest.approx(right)
    assert report.nothing.value == pytest.approx(none)
    assert right > none + 0.2
    # It holds in every resample; but for the rounding of sums.
    assert report.shapley_share["visual"] == pytest.approx((0, 0, 0), abs=1e-12)
    assert report.shapley_share["audio"] == pytest.approx((1, 1, 1), abs=1e-12)
    assert report.shapley["audio"].value == pytest.approx(right - none)
    assert report.alone["audio"] == report.joint == report.removed["visual"]
    assert report.alone["visual"] == report.nothing == report.removed["audio"]
    assert report.noisy["visual"][2.0] == report.joint
    assert report.noisy["audio"][2.0].value < report.joint.value


def test_every_coalition_and_the_shapley_values_of_three() -> None:
    inputs, labels = samples(NAMES)
    model = Added(audio=1.0, visual=0.6, text=-0.2)

    def value(there: tuple[str, ...]) -> float:
        z = sum((model.weights[n] * inputs[n] for n in there), torch.zeros(len(labels), 3))
        return accuracy(z, labels)

    report = imbalance_report(model, batched(inputs, labels), resamples=0)
    assert report.confidence is None and report.joint.low is None
    for name in NAMES:
        others = tuple(n for n in NAMES if n != name)
        assert report.alone[name].value == pytest.approx(value((name,)))
        assert report.removed[name].value == pytest.approx(value(others))
        # They are averages over the orders in which modalities come, and not over coalitions.
        gains = []
        for order in itertools.permutations(NAMES):
            before = order[: order.index(name)]
            gains.append(value((*before, name)) - value(before))
        expected = sum(gains) / len(gains)
        assert report.shapley[name].value == pytest.approx(expected)
        gain = value(NAMES) - value(())
        assert report.shapley_share[name].value == pytest.approx(expected / gain)
    assert sum(s.value for s in report.shapley_share.values()) == pytest.approx(1)


def test_a_mean_baseline_and_one_of_the_users() -> None:
    inputs, labels = samples(NAMES[:2])
    model = Added(audio=1.0, visual=0.7)
    means = imbalance_report(model, [(inputs, labels)], baseline="mean", resamples=0)
    z = inputs["audio"] + 0.7 * inputs["visual"].mean(0)
    assert means.alone["audio"].value == pytest.approx(accuracy(z, labels))
    others = imbalance_report(
        model, [(inputs, labels)], baseline=lambda name, x: x.roll(1, 0), resamples=0
    )
    z = inputs["audio"] + 0.7 * inputs["visual"].roll(1, 0)
    assert others.alone["audio"].value == pytest.approx(accuracy(z, labels))


def test_noise_is_that_of_the_stream_in_standard_deviations() -> None:
    inputs, labels = samples(NAMES[:2])
    batches = batched(inputs, labels, 100)
    model = Added(audio=1.0, visual=0.7)
    report = imbalance_report(model, batches, severities=[1.5], seed=4, resamples=0)
    stream = NoiseStream(4, name="imbalance report")
    parts = []
    for x, _ in batches:
        visual = x["visual"]
        spread = visual.double().std(correction=0)
        noise = stream.normal(visual.numel(), 2).reshape(visual.shape)
        parts.append(x["audio"] + 0.7 * (visual + 1.5 * spread * noise))
        stream.advance()
    expected = accuracy(torch.cat(parts), labels)
    assert report.noisy["visual"][1.5].value == pytest.approx(expected)
    assert expected < report.joint.value
    again = imbalance_report(model, batches, severities=[1.5], seed=4, resamples=0)
    assert again == report
    other = imbalance_report(model, batches, severities=[1.5], seed=5, resamples=0)
    assert other.noisy != report.noisy


def test_noise_of_the_users_and_integers() -> None:
    inputs, labels = samples(NAMES[:2])
    tokens = {"audio": inputs["audio"].argmax(1), "visual": inputs["visual"]}

    def forward(x: dict[str, Tensor]) -> Tensor:
        return nn.functional.one_hot(x["audio"], 3) + x["visual"]

    report = imbalance_report(forward, [(tokens, labels)], forward=forward, resamples=0)
    assert list(report.noisy) == ["visual"]
    assert "audio was left out" in report.notes[0] and "int64" in report.notes[0]
    seen = []

    def corrupt(name: str, x: Tensor, severity: float) -> Tensor:
        seen.append((name, severity))
        return torch.zeros_like(x)

    report = imbalance_report(
        forward, [(tokens, labels)], forward=forward, corrupt=corrupt, severities=(2, 1)
    )
    assert seen == [(n, s) for n in NAMES[:2] for s in (1.0, 2.0)]
    assert report.noisy["visual"][1.0] == report.removed["visual"]


def test_intervals_are_percentiles_of_a_paired_bootstrap() -> None:
    inputs, labels = samples(NAMES[:2], rows=300)
    model = Added(audio=1.0, visual=0.4)
    report = imbalance_report(model, [(inputs, labels)], resamples=2000, confidence=0.9, seed=3)
    # Other resamples of the same kind.
    right = {
        True: ((inputs["audio"] + 0.4 * inputs["visual"]).argmax(1) == labels).double().numpy(),
        False: (inputs["audio"].argmax(1) == labels).double().numpy(),
    }
    rows = np.random.default_rng(9).integers(0, 300, (2000, 300))
    ends = np.quantile(right[True][rows].mean(1), [0.05, 0.95])
    # A 5 % quantile of 2,000 draws has a standard deviation of sqrt(.05 * .95 / 2000) / density,
    # 0.0486 of the bootstrap's own; of two such, and twice as much as three of them.
    allowed = 6 * math.sqrt(2) * 0.0486 * right[True][rows].mean(1).std() / 1.0
    assert [report.joint.low, report.joint.high] == pytest.approx(ends, abs=allowed)
    assert report.joint.low < report.joint.value < report.joint.high
    assert report.confidence == 0.9
    narrow = imbalance_report(model, [(inputs, labels)], resamples=2000, confidence=0.5, seed=3)
    assert report.joint.low < narrow.joint.low < narrow.joint.high < report.joint.high


def test_the_fast_way_to_resample_is_the_metric_itself() -> None:
    """Accuracy is resampled as a mean of samples, a callable by calls: the same intervals."""
    inputs, labels = samples(NAMES[:2], rows=60)
    model, data = Added(audio=1.0, visual=0.4), [(inputs, labels)]
    named = imbalance_report(model, data, resamples=40)
    own = imbalance_report(model, data, metric=accuracy, higher_is_better=True, resamples=40)
    for name in ("joint", "nothing", "alone", "removed", "noisy", "shapley", "shapley_share"):
        a, b = ([*flat(getattr(report, name))] for report in (named, own))
        assert a == pytest.approx(b)
    target = {n: x[:, :1] for n, x in inputs.items()}
    sought = target["audio"] + 0.4 * target["visual"] + 0.3 * torch.randn(60, 1)
    numbers = [(target, sought)]

    def error(z: Tensor, y: Tensor) -> float:
        return float(metrics.mean_absolute_error(y, z))

    named = imbalance_report(model, numbers, metric="mae", resamples=40)
    own = imbalance_report(model, numbers, metric=error, higher_is_better=False, resamples=40)
    assert not named.higher_is_better
    for name in ("joint", "alone", "shapley_share"):
        a, b = ([*flat(getattr(report, name))] for report in (named, own))
        assert a == pytest.approx(b, rel=1e-5)  # torchmetrics adds in float32


def flat(value: Any) -> Any:
    if isinstance(value, dict):
        for part in value.values():
            yield from flat(part)
    elif isinstance(value, tuple):
        yield from (math.nan if v is None else v for v in value)


def test_metrics_against_scikit_learn() -> None:
    inputs, labels = samples(NAMES[:2], strength=0.8)
    model = Added(audio=1.0, visual=0.5)
    z = inputs["audio"] + 0.5 * inputs["visual"]

    def joint(metric: Any, y: Tensor, x: dict[str, Tensor] = inputs, **more: Any) -> float:
        return imbalance_report(model, [(x, y)], metric=metric, resamples=3, **more).joint.value

    f1 = metrics.f1_score(labels, z.argmax(1), average="macro")
    assert joint("f1", labels) == pytest.approx(f1, rel=1e-5)
    precision = metrics.average_precision_score(labels, z.softmax(1), average="macro")
    assert joint("map", labels) == pytest.approx(precision, rel=1e-5)
    several = (torch.rand(200, 3) < 0.4).float()
    precision = metrics.average_precision_score(several, z, average="macro")
    assert joint("map", several) == pytest.approx(precision, rel=1e-5)
    f1 = metrics.f1_score(several, z > 0, average="macro")
    assert joint("f1", several) == pytest.approx(f1, rel=1e-5)
    # Logits that look like probabilities are logits all the same.
    near = {n: x.clamp(0.1, 0.4) for n, x in inputs.items()}
    f1 = metrics.f1_score(several, torch.ones(200, 3), average="macro")
    assert joint("f1", several, near) == pytest.approx(f1, rel=1e-5)
    one = {n: x[:, :1] for n, x in inputs.items()}
    yes = (labels == 0).float()[:, None]
    hit = metrics.accuracy_score(yes, z[:, :1] > 0)
    assert joint("accuracy", yes, one) == pytest.approx(hit)
    assert joint("f1", yes, one) == pytest.approx(metrics.f1_score(yes, z[:, :1] > 0), rel=1e-5)
    mae = metrics.mean_absolute_error(several, z)
    assert joint("mae", several) == pytest.approx(mae, rel=1e-5)
    half = labels.clone()
    half[100:] = -100
    hit = metrics.accuracy_score(labels[:100], z[:100].argmax(1))
    assert joint("accuracy", half) == pytest.approx(hit)
    top = torchmetrics.classification.MulticlassAccuracy(3, top_k=2, average="micro")
    top.update(z[:5], labels[:5])
    seen = top.compute()
    expected = metrics.top_k_accuracy_score(labels, z, k=2)
    assert joint(top, labels) == pytest.approx(expected)
    assert top.compute() == seen, "the user's metric has its own state"
    kappa = joint(
        lambda a, b: metrics.cohen_kappa_score(b, a.argmax(1)), labels, higher_is_better=True
    )
    assert kappa == pytest.approx(metrics.cohen_kappa_score(labels, z.argmax(1)))


def test_the_name_of_a_metric_of_one_logit() -> None:
    inputs, labels = samples(NAMES[:2])
    one, yes = {n: x[:, :1] for n, x in inputs.items()}, (labels == 0).long()
    named = {
        metric: imbalance_report(
            Added(audio=1.0, visual=0.5), [(one, yes)], metric=metric, resamples=0
        ).metric
        for metric in ("accuracy", "f1", "map")
    }
    assert named == {
        "accuracy": "accuracy",
        "f1": "F1 of the positive class",
        "map": "average precision",
    }


def test_a_metric_waits_for_no_other_process() -> None:
    """Torchmetrics would gather the samples of all processes, which do not ask for them."""

    def gather(value: Tensor, group: Any = None) -> list[Tensor]:
        raise AssertionError("another process was asked")

    inputs, labels = samples(NAMES[:2])
    metric = torchmetrics.classification.MulticlassAccuracy(
        3, average="micro", dist_sync_fn=gather, distributed_available_fn=lambda: True
    )
    report = imbalance_report(
        Added(audio=1.0, visual=0.5), [(inputs, labels)], metric=metric, resamples=0
    )
    hit = (inputs["audio"] + 0.5 * inputs["visual"]).argmax(1) == labels
    assert report.joint.value == pytest.approx(float(hit.double().mean()))
    assert metric.sync_on_compute, "the user's metric is as it was"


@pytest.mark.parametrize("metric", ["map", "f1"])
def test_rare_labels_do_not_pull_an_interval_down(metric: str) -> None:
    """A resample in which nobody has the label says nothing about it."""
    labels = torch.zeros(60, 4)
    labels[:30, 0] = 1
    for label in (1, 2, 3):
        labels[label, label] = 1  # one sample: 37 % of the resamples have none
    logits = 8 * labels - 4
    report = imbalance_report(
        Added(audio=1.0, visual=0.0), [({"audio": logits, "visual": logits}, labels)], metric=metric
    )
    assert report.joint == pytest.approx((1, 1, 1))


def test_probabilities_in_the_place_of_logits_are_noted() -> None:
    inputs, labels = samples(NAMES[:2])
    yes = (labels == 0).long()

    def model(**x: Tensor) -> Tensor:
        return (x["audio"] + x["visual"])[:, 0].sigmoid()

    report = imbalance_report(model, [(inputs, yes)], resamples=0)
    assert any("between 0 and 1. If they are probabilities" in note for note in report.notes)
    assert report.joint.value == pytest.approx(float(yes.float().mean()))  # all are "yes"
    right = imbalance_report(model, [(inputs, yes)], output=torch.logit, resamples=0)
    assert not right.notes and right.joint.value > report.joint.value + 0.1
    # The largest of several is the same either way.
    several = imbalance_report(
        lambda **x: (x["audio"] + x["visual"]).softmax(1), [(inputs, labels)], resamples=0
    )
    assert not several.notes


def test_the_model_leans_on_a_modality_that_costs_more_than_all_others() -> None:
    inputs, labels = samples(NAMES)

    def leans_on(count: int = 3, **more: Any) -> str | None:
        data = [({n: inputs[n] for n in NAMES[:count]}, labels)]
        weights = dict(zip(NAMES, (1.0, 0.0, 0.0), strict=True))
        model = Added(**{n: weights[n] for n in NAMES[:count]})
        return imbalance_report(model, data, **more).leans_on

    assert leans_on() == leans_on(2) == "audio"
    assert leans_on(resamples=0) is None
    # Each is a copy of the other: neither costs more.
    twins = [({"audio": inputs["audio"], "visual": inputs["audio"]}, labels)]
    report = imbalance_report(Added(audio=1.0, visual=1.0), twins)
    assert report.leans_on is None
    assert any("do not say which one" in text for text in report.findings)
    # Without "visual" it is better; without "audio" as good: it leans on neither.
    noise = [({"audio": torch.zeros(200, 3), "visual": 3 * torch.randn(200, 3)}, labels)]

    def hinders(**x: Tensor) -> Tensor:
        return x["audio"] + x["visual"] + nn.functional.one_hot(labels, 3)

    assert imbalance_report(hinders, noise).leans_on is None

    # The intervals of both overlap, but in each resample more is wrong without audio.
    def model(audio: Tensor, visual: Tensor) -> Tensor:
        right = nn.functional.one_hot(labels, 3).float()
        wrong = 40 * bool((audio == 0).all()), 28 * bool((visual == 0).all())
        right[: max(wrong)] *= -1
        return right

    report = imbalance_report(model, [({n: inputs[n] for n in NAMES[:2]}, labels)])
    audio, visual = report.removed["audio"], report.removed["visual"]
    assert audio.high is not None and visual.low is not None and audio.high > visual.low
    assert report.leans_on == "audio"


def test_classes_of_places() -> None:
    x = {n: torch.randn(20, 3, 4) for n in NAMES[:2]}
    places = torch.randint(0, 3, (20, 4))
    report = imbalance_report(Added(audio=1.0, visual=0.5), [(x, places)], resamples=5)
    hit = (x["audio"] + 0.5 * x["visual"]).argmax(1) == places
    assert report.joint.value == pytest.approx(float(hit.double().mean()))
    with pytest.raises(ValueError, match=r"probes need one label for each sample, got .*\[20, 4\]"):
        imbalance_report(
            Added(audio=1.0, visual=0.5),
            [(x, places)],
            encoders={"audio": nn.Identity()},
            train_loader=[(x, places)],
        )


def test_of_an_error_a_lower_one_is_a_gain() -> None:
    x = torch.randn(100, 1)
    inputs = {"audio": x, "visual": torch.randn(100, 1)}
    model = Added(audio=1.0, visual=0.0)
    report = imbalance_report(model, [(inputs, x)], metric="mae")
    assert report.joint.value == 0
    assert report.nothing.value == pytest.approx(float(x.abs().mean()))
    assert report.shapley["audio"].value == pytest.approx(report.nothing.value)
    assert report.shapley_share["audio"] == pytest.approx((1, 1, 1))
    assert report.shapley_share["visual"] == pytest.approx((0, 0, 0), abs=1e-12)


def encoded(seed: int) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    torch.manual_seed(seed)
    bad = nn.Linear(3, 1)
    return {"audio": nn.Identity(), "visual": bad}, {"visual": nn.Identity()}


def test_probes_are_scikit_learns_on_frozen_features() -> None:
    inputs, labels = samples(NAMES[:2])
    train, known = samples(NAMES[:2])
    joint, alone = encoded(0)
    report = imbalance_report(
        Added(audio=1.0, visual=1.0),
        batched(inputs, labels),
        encoders=joint,
        unimodal_encoders=alone,
        train_loader=batched(train, known),
    )

    def probed(net: nn.Module, name: str) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with torch.no_grad():
            model.fit(net(train[name]).double(), known)
            return float(model.score(net(inputs[name]).double(), labels))

    visual = report.probes["visual"]
    assert visual.joint.value == pytest.approx(probed(joint["visual"], "visual"))
    assert visual.alone is not None and visual.ratio is not None
    assert visual.alone.value == pytest.approx(probed(nn.Identity(), "visual"))
    assert visual.ratio.value == pytest.approx(visual.joint.value / visual.alone.value)
    # One feature of three cannot tell three classes apart as well as all of them.
    assert visual.ratio.high is not None and visual.ratio.high < 1
    assert report.probes["audio"].joint.value == pytest.approx(probed(nn.Identity(), "audio"))
    assert report.probes["audio"].ratio is None
    assert any("visual" in text and "behind" in text for text in report.findings)


def test_probes_of_two_classes_several_labels_and_numbers() -> None:
    inputs, labels = samples(NAMES[:2])
    model = Added(audio=1.0, visual=1.0)
    nets = {n: nn.Identity() for n in NAMES[:2]}

    def probed(y: Tensor, metric: Any, x: dict[str, Tensor] = inputs) -> float:
        data = [(x, y)]
        found = imbalance_report(
            model,
            data,
            metric=metric,
            encoders={n: lambda z: nn.functional.pad(z, (0, 1)) for n in nets},
            train_loader=data,
            resamples=0,
        )
        return found.probes["audio"].joint.value

    features = nn.functional.pad(inputs["audio"], (0, 1)).double()
    two = labels.clamp(max=1)
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, two)
    assert probed(two, "accuracy") == pytest.approx(fitted.score(features, two))
    one = {n: x[:, :1] for n, x in inputs.items()}
    small = nn.functional.pad(one["audio"], (0, 1)).double()
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(small, two)
    assert probed(two, "accuracy", one) == pytest.approx(fitted.score(small, two))
    several = (inputs["audio"] + torch.randn(200, 3) > 0.5).long()
    each = [
        make_pipeline(StandardScaler(), LogisticRegression()).fit(features, several[:, i])
        for i in range(3)
    ]
    guess = np.stack([f.decision_function(features) for f in each], 1)
    expected = metrics.average_precision_score(several, guess)
    assert probed(several, "map") == pytest.approx(expected, rel=1e-5)
    target = inputs["audio"] * 2 + torch.randn(200, 3)
    ridge = make_pipeline(StandardScaler(), RidgeCV([10.0**k for k in range(-3, 4)]))
    guess = ridge.fit(features, target).predict(features)
    expected = metrics.mean_absolute_error(target, guess)
    assert probed(target, "mae") == pytest.approx(expected, rel=1e-5)
    assert probed(target[:, :, None], "mae") == pytest.approx(expected, rel=1e-5)


def test_models_trained_alone() -> None:
    inputs, labels = samples(NAMES[:2])

    class Output(dict):  # type: ignore[type-arg]
        pass

    def model(audio: Tensor, visual: Tensor) -> Output:
        return Output(logits=audio + visual)

    report = imbalance_report(
        model,
        batched(inputs, labels),
        output=lambda out: out["logits"],
        unimodal_models={"visual": lambda x: Output(logits=2 * x), "audio": lambda x: -x},
        resamples=0,
    )
    expected = {"audio": accuracy(-inputs["audio"], labels)}
    expected["visual"] = accuracy(inputs["visual"], labels)
    assert {n: e.value for n, e in report.trained_alone.items()} == pytest.approx(expected)
    assert list(report.trained_alone) == ["audio", "visual"]


def test_many_modalities() -> None:
    names = [f"sensor {i}" for i in range(7)]
    inputs, labels = samples(names, rows=40)

    def model(x: dict[str, Tensor]) -> Tensor:
        return sum(x.values(), torch.zeros(()))

    report = imbalance_report(model, [(inputs, labels)], forward=model, resamples=5)
    assert report.shapley == {} and "128 passes" in report.notes[0]
    assert list(report.removed) == names
    report = imbalance_report(model, [(inputs, labels)], forward=model, shapley=True, resamples=5)
    assert sum(s.value for s in report.shapley_share.values()) == pytest.approx(1)
    assert not report.notes
    with_six = {n: inputs[n] for n in names[:6]}
    assert imbalance_report(model, [(with_six, labels)], forward=model, resamples=0).shapley


def test_nothing_of_the_users_changes() -> None:
    inputs, labels = samples(NAMES[:2], rows=50)
    model = Fused({"audio": 3, "visual": 3})
    model.encoders["visual"].eval()
    model.head.requires_grad_(False)
    alone = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    model(**inputs).sum().backward()
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(inputs["audio"], inputs["visual"], labels)
    loader = DataLoader(data, 16, shuffle=True, generator=generator)

    def state() -> list[Any]:
        numpy = np.random.get_state()  # noqa: NPY002
        return [
            state_of(model),
            state_of(alone),
            torch.get_rng_state(),
            generator.get_state(),
            list(numpy[1]),
            numpy[2:],
            random.getstate(),
            [x.clone() for x in data.tensors],
        ]

    def corrupt(name: str, x: Tensor, severity: float) -> Tensor:
        random.random(), np.random.rand()  # noqa: NPY002
        return x.mul_(torch.rand_like(x))

    before = state()
    report = imbalance_report(
        model,
        loader,
        modalities=("audio", "visual"),
        corrupt=corrupt,
        unimodal_models={"audio": alone},
        encoders={"audio": "encoders.audio", "visual": model.encoders["visual"]},
        unimodal_encoders={"audio": alone[0]},
        train_loader=loader,
        resamples=10,
    )
    assert report.samples == 50
    assert same(state(), before)

    def broken(name: str, x: Tensor, severity: float) -> Tensor:
        np.random.rand()  # noqa: NPY002
        raise KeyError(f"{torch.rand(1)}")

    with pytest.raises(KeyError):
        imbalance_report(model, loader, modalities=("audio", "visual"), corrupt=broken)
    assert same(state(), before)


def test_a_model_in_evaluation_mode_and_without_gradients_is_what_is_measured() -> None:
    inputs, labels = samples(NAMES[:2], rows=90)
    model = Fused({"audio": 3, "visual": 3})
    report = imbalance_report(model, [(inputs, labels)], resamples=0)
    model.eval()
    with torch.no_grad():
        assert report.joint.value == pytest.approx(accuracy(model(**inputs), labels))


@pytest.mark.parametrize("kind", ["mapping", "tuple", "batch", "list", "labels elsewhere"])
def test_every_kind_of_loader_gives_the_same(kind: str) -> None:
    inputs, labels = samples(NAMES[:2], rows=60)
    model = Added(audio=1.0, visual=0.5)
    expected = imbalance_report(model, batched(inputs, labels, 20))
    more: dict[str, Any] = {}
    data: Any = batched(inputs, labels, 20)
    if kind == "mapping":
        data = [{**x, "labels": y} for x, y in data]
    elif kind == "tuple":
        data = [(*x.values(), y) for x, y in data]
        more = {"modalities": ["audio", "visual"]}
    elif kind == "batch":
        data = [{"x": x, "y": y} for x, y in data]
        more = {"batch": lambda b: (b["x"], b["y"])}
    elif kind == "list":
        data = DataLoader(TensorDataset(*inputs.values(), labels), 20)
        more = {"modalities": ("audio", "visual")}
    else:
        data = [{**x, "label": y, "id": torch.arange(len(y))} for x, y in data]
        more = {"modalities": ("audio", "visual"), "forward": lambda x: model(**_two(x))}
    assert imbalance_report(model, data, **more) == expected


def _two(x: dict[str, Tensor]) -> dict[str, Tensor]:
    assert list(x) == ["audio", "visual", "id"]
    return {n: x[n] for n in ("audio", "visual")}


@pytest.mark.slow
def test_importing_mmfuse_imports_no_package_of_the_report() -> None:
    heavy = ["matplotlib", "sklearn", "scipy", "torchmetrics", "rich", "jinja2"]
    code = f"import torch, sys; a = set(sys.modules); import mmfuse; print([m for m in {heavy} "
    code += "if m in set(sys.modules) - a])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "imbalance_report" in dir(mmfuse) and "ImbalanceReport" in dir(mmfuse)
