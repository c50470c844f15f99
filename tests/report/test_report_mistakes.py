"""Bad input of a report: one sentence with the way out, before anything has changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reported import Added, Fused, batched, same, samples, state_of
from torch import Tensor, nn

from mmfuse import imbalance_report

INPUTS, LABELS = samples(("audio", "visual"), rows=30)
DATA = batched(INPUTS, LABELS, 10)
MODEL = Added(audio=1.0, visual=0.5)
NETS = {"audio": nn.Identity(), "visual": nn.Identity()}


def reported(model: Any = MODEL, loader: Any = DATA, **more: Any) -> Callable[[], Any]:
    return lambda: imbalance_report(model, loader, resamples=2, **more)


def of(inputs: Any = INPUTS, labels: Any = LABELS) -> list[tuple[Any, Any]]:
    return [(inputs, labels)]


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "swapped": (
        reported(DATA, MODEL),
        TypeError,
        r"model must be .* got list \(are model and loader swapped\?\)",
    ),
    "each sample is its own mean": (
        reported(loader=batched(INPUTS, LABELS, 1), baseline="mean"),
        ValueError,
        r"each batch of the loader has one sample, which would not be masked: take larger",
    ),
    "NaN marks a missing sample": (
        reported(
            lambda **x: sum(v.nan_to_num() for v in x.values()),
            of({**INPUTS, "visual": INPUTS["visual"].where(LABELS[:, None] > 0, torch.nan)}),
        ),
        ValueError,
        r"the input of 'visual' holds NaN .* give corrupt=, or severities=\(\) to leave noise out",
    ),
    "a loader of tensors": (
        reported(loader=[INPUTS["audio"]]),
        TypeError,
        r"loader yields Tensor, where \(inputs by name, labels\) is expected; give batch=",
    ),
    "a loader of a few tensors": (
        reported(loader=[(*INPUTS.values(), LABELS)]),
        TypeError,
        r"loader yields tuple of \(Tensor, Tensor, Tensor\), where .* give batch=, such as lambda",
    ),
    "a mapping without labels": (
        reported(loader=[INPUTS]),
        TypeError,
        r"loader yields dict with \['audio', 'visual'\], where .* give batch=",
    ),
    "batch= of something else": (
        reported(batch=lambda b: b[0]),
        TypeError,
        r"batch= returns dict with \['audio', 'visual'\], where \(inputs by name",
    ),
    "a loader that is a tensor": (
        reported(loader=INPUTS["audio"]),
        TypeError,
        "loader must yield batches, got Tensor",
    ),
    "no batch": (reported(loader=iter([])), ValueError, "loader yields no batch; a generator"),
    "a batch without a modality": (
        reported(loader=[*DATA, ({"audio": INPUTS["audio"]}, LABELS)]),
        ValueError,
        r"has the inputs \['audio'\], without \['visual'\]",
    ),
    "modalities that are not there": (
        reported(modalities=["audio", "video"]),
        ValueError,
        r"has the inputs \['audio', 'visual'\], without \['video'\]",
    ),
    "one modality": (
        reported(modalities=["audio"]),
        ValueError,
        r"two or more different modalities, got \['audio'\]",
    ),
    "one input": (
        reported(loader=of({"audio": INPUTS["audio"]})),
        ValueError,
        r"two or more different modalities, got \['audio'\]",
    ),
    "rows": (
        reported(loader=of(labels=LABELS[:7])),
        ValueError,
        r"a batch of loader has 7 labels, but rows \{'audio': 30, 'visual': 30\}",
    ),
    "a model of other names": (
        reported(nn.Linear(3, 3)),
        TypeError,
        r"cannot be called with arguments \['audio', 'visual'\].*give forward=",
    ),
    "a model that returns a mapping": (
        reported(lambda audio, visual: {"logits": audio}),
        TypeError,
        r"returns dict for all inputs, not a tensor: say with output=",
    ),
    "outputs without rows": (
        reported(lambda audio, visual: audio.mean()),
        ValueError,
        r"for 10 samples the output \(masked 3\) has shape \[\]; output=",
    ),
    "NaN": (
        reported(lambda audio, visual: audio / audio.norm()),
        ValueError,
        r"the model with 'audio' masked returns NaN or infinity.*baseline=",
    ),
    "an encoder that the model has not": (
        reported(Fused({"audio": 3, "visual": 3}), encoders={"audio": "encoder.audio"}),
        ValueError,
        r"encoders\['audio'\]: 'encoder.audio' is no module .*did you mean 'encoders.audio'",
    ),
    "an encoder that is a parameter": (
        reported(Fused({"audio": 3, "visual": 3}), encoders={"audio": "encoders.audio.0.weight"}),
        ValueError,
        r"encoders\['audio'\]: 'encoders.audio.0.weight' names parameters, where a module",
    ),
    "an encoder of another modality": (
        reported(encoders={"text": nn.Identity()}, train_loader=DATA),
        ValueError,
        r"encoders names \['text'\], but the modalities are \['audio', 'visual'\]",
    ),
    "a model of another modality": (
        reported(unimodal_models={"text": nn.Identity()}),
        ValueError,
        r"unimodal_models names \['text'\]",
    ),
    "encoders without training samples": (
        reported(encoders=NETS),
        ValueError,
        "probes of encoders= need train_loader=",
    ),
    "encoders of nothing": (
        reported(unimodal_encoders=NETS, train_loader=DATA),
        ValueError,
        r"unimodal_encoders names \['audio', 'visual'\], to which encoders= has no counterpart",
    ),
    "an encoder that returns a tuple": (
        reported(encoders={"audio": lambda x: (x, x)}, train_loader=DATA),
        TypeError,
        r"encoders\['audio'\] must return features \[B, ...\], got tuple: give a callable",
    ),
    "a lazy model": (
        reported(nn.LazyLinear(3)),
        ValueError,
        "lazy and has no weight yet: call the model once first",
    ),
    "a class without samples in the average": (
        reported(loader=of(labels=LABELS.clamp(max=1)), metric="f1"),
        ValueError,
        r"metric='f1' averages over classes, of which 2 has no sample in the loader: give more",
    ),
    "a label without positive samples": (
        reported(loader=of(labels=nn.functional.one_hot(LABELS.clamp(max=1), 3)), metric="map"),
        ValueError,
        r"label 2 has no positive sample among the 30 of the loader: give more samples, or leave",
    ),
    "a class without training samples": (
        reported(encoders=NETS, train_loader=of(labels=LABELS.clamp(max=1))),
        ValueError,
        "class 2 has samples in loader but none in train_loader.*give a train_loader",
    ),
    "a class that the model has not": (
        reported(loader=of(labels=LABELS + 1)),
        ValueError,
        "labels of loader run from 1 to 3, but the model has outputs for 3 classes",
    ),
    "a class of the training samples that the model has not": (
        reported(encoders=NETS, train_loader=of(labels=LABELS + 1)),
        ValueError,
        "labels of train_loader run from 1 to 3, but the model has outputs for 3 classes",
    ),
    "numbers": (
        reported(loader=of(labels=torch.rand(30))),
        ValueError,
        r"metric='accuracy' is for classes, but the labels are torch.float32 \[30\]: give metric=",
    ),
    "labels of another shape": (
        reported(loader=of(labels=LABELS[:, None].expand(30, 2))),
        ValueError,
        r"the labels are \[30, 2\], the outputs \[30, 3\]",
    ),
    "inputs on several devices": (
        reported(loader=of({**INPUTS, "audio": INPUTS["audio"].to("meta")})),
        ValueError,
        "a batch of loader has 'audio' on meta, 'visual' on cpu: all of its inputs",
    ),
    "severities in a tensor": (
        reported(severities=torch.tensor(1.0)),
        TypeError,
        "severities must be numbers, got Tensor",
    ),
    "an unknown metric": (reported(metric="auc"), ValueError, "'mae' or a callable, got 'auc'"),
    "a metric of no direction": (
        reported(metric=lambda z, y: 1.0),
        TypeError,
        "higher_is_better= must be True or False",
    ),
    "a metric that is a number": (reported(metric=3), TypeError, "a name or a callable, got int"),
    "confidence": (reported(confidence=95), ValueError, "between 0 and 1, got 95"),
    "severities": (reported(severities=[0, 1]), ValueError, "must be positive and finite"),
    "a severity": (reported(severities=1.0), TypeError, "severities must be numbers, got float"),
    "history": (reported(history=[3]), TypeError, "history must be a list of .* got list of int"),
    "history of losses": (
        reported(history=[{"loss": 3}]),
        ValueError,
        r"no tag such as \"scores/audio\", only \['loss'\]",
    ),
    "a corruption that reshapes": (
        reported(corrupt=lambda name, x, severity: x[:1]),
        ValueError,
        r"corrupt= must return a tensor like the input of 'audio', \[10, 3\]; got \[1, 3\]",
    ),
    "resamples": (
        lambda: imbalance_report(MODEL, DATA, resamples=10**9),
        ValueError,
        "resamples must be at most 100000",
    ),
    "integers and their mean": (
        reported(loader=of({n: x.long() for n, x in INPUTS.items()}), baseline="mean"),
        TypeError,
        "whose mean the model cannot take",
    ),
    "numbers of 8 bits and their mean": (
        reported(
            loader=of({n: x.to(torch.float8_e4m3fn) for n, x in INPUTS.items()}), baseline="mean"
        ),
        TypeError,
        r"inputs\['audio'\] is of torch.float8_e4m3fn, of which PyTorch takes no mean; give base",
    ),
    "sparse labels": (
        reported(loader=of(labels=LABELS.to_sparse())),
        TypeError,
        "loader yields labels of torch.int64, torch.sparse_coo, on cpu, where a dense tensor",
    ),
    "labels of 8 bits": (
        reported(loader=of(labels=LABELS.to(torch.float8_e4m3fn))),
        TypeError,
        "loader yields labels of torch.float8_e4m3fn, torch.strided, on cpu, where a dense",
    ),
    "labels that hold nothing": (
        reported(loader=of(labels=LABELS.to("meta"))),
        TypeError,
        "labels of torch.int64, torch.strided, on meta",
    ),
    "the model's class": (
        reported(type(MODEL)),
        TypeError,
        "model must be a module or a function, got the class .*: make one",
    ),
    "an encoder's class": (
        reported(encoders={"audio": torch.nn.Linear}),
        TypeError,
        r"encoders\['audio'\] must be a module or a function, got the class Linear: make one",
    ),
    "a metric's class": (
        reported(metric=torch.nn.Linear, higher_is_better=True),
        TypeError,
        "metric must be a module or a function, got the class Linear: make one",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(mistake: str) -> None:
    call, kind, message = MISTAKES[mistake]
    before = torch.get_rng_state(), {n: x.clone() for n, x in INPUTS.items()}
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(x, before[1][n]) for n, x in INPUTS.items())


def test_a_model_is_as_before_when_a_late_check_fails() -> None:
    model = Fused({"audio": 3, "visual": 3}).train()
    before = state_of(model)
    with pytest.raises(ValueError, match="labels of loader run from"):
        imbalance_report(model, of(labels=LABELS + 5))
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    ("module", "package", "more"),
    [
        ("torchmetrics", "torchmetrics", {}),
        ("scipy.stats", "scipy", {}),
        ("sklearn", "scikit-learn", {"encoders": NETS, "train_loader": DATA}),
    ],
)
def test_a_missing_package_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, more: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    called: list[Tensor] = []

    def model(audio: Tensor, visual: Tensor) -> Tensor:
        called.append(audio)
        return audio

    with pytest.raises(ImportError, match=rf"needs {package}: pip install {package}"):
        imbalance_report(model, DATA, **more)
    assert called == []


@pytest.mark.parametrize(
    ("module", "package", "suffix"),
    [("matplotlib.figure", "matplotlib", ".png"), ("jinja2", "jinja2", ".html")],
)
def test_a_missing_package_for_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, module: str, package: str, suffix: str
) -> None:
    report = imbalance_report(MODEL, DATA, resamples=0)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install {package}"):
        report.save(tmp_path / f"report{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_some_batches_of_one_sample_are_noted() -> None:
    report = imbalance_report(MODEL, batched(INPUTS, LABELS, 29), baseline="mean", resamples=0)
    assert "In 1 of 2 batches nothing was masked" in report.notes[0]
    assert not imbalance_report(MODEL, batched(INPUTS, LABELS, 29), resamples=0).notes
