"""ImbalanceReport: as a dict, a table, text and files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reported import Added, batched, samples
from rich.table import Table
from torch import nn

import mmfuse
from mmfuse.report._findings import headline
from mmfuse.report.summary import Estimate, ImbalanceReport, Probes

INPUTS, LABELS = samples(("audio", "visual"), rows=90)
DATA = batched(INPUTS, LABELS)
HISTORY = [
    {"scores/audio": torch.tensor(0.1 * i), "scores/visual": 0.2, "finite": torch.tensor(True)}
    for i in range(5)
]


def made(**more: Any) -> ImbalanceReport:
    nets = {n: nn.Identity() for n in INPUTS}
    return mmfuse.imbalance_report(
        Added(audio=1.0, visual=0.4),
        DATA,
        encoders=nets,
        unimodal_encoders={"visual": nn.Identity()},
        unimodal_models=nets,
        train_loader=DATA,
        history=HISTORY,
        resamples=20,
        **more,
    )


def plain(**more: Any) -> ImbalanceReport:
    """One whose numbers are given."""
    base: dict[str, Any] = {
        "metric": "accuracy",
        "higher_is_better": True,
        "samples": 10,
        "modalities": ("audio", "visual"),
        "confidence": 0.95,
        "joint": Estimate(0.9, 0.8, 0.95),
        "nothing": Estimate(0.1, 0.05, 0.2),
        "alone": {"audio": Estimate(0.8, 0.7, 0.85), "visual": Estimate(0.3, 0.2, 0.4)},
        "removed": {"audio": Estimate(0.3, 0.2, 0.4), "visual": Estimate(0.8, 0.7, 0.85)},
    }
    return ImbalanceReport(**{**base, **more})


def test_the_dict_is_json_and_holds_every_number() -> None:
    report = made()
    found = report.as_dict()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert found["metric"] == "accuracy" and found["samples"] == 90
    assert found["modalities"] == ["audio", "visual"]
    assert found["joint"]["value"] == report.joint.value
    assert found["noisy"]["audio"]["0.5"]["low"] == report.noisy["audio"][0.5].low
    assert found["probes"]["audio"]["ratio"] is None
    assert found["probes"]["visual"]["ratio"]["value"] == 1
    # Each to float32's rounding.
    assert found["history"]["fields"]["scores"]["audio"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert found["findings"] == report.findings


def test_what_is_not_defined_is_none_and_a_dash() -> None:
    nothing = {n: Estimate(math.nan) for n in ("audio", "visual")}
    none = {n: Estimate(0.0) for n in nothing}
    report = plain(shapley=none, shapley_share=nothing)
    assert report.as_dict()["shapley_share"]["audio"]["value"] is None
    assert dict(report.rows())["Shapley share"]["audio"].value is not None
    assert "—" in str(report)
    assert any("no better than without" in text for text in report.findings)


def test_a_metric_that_is_not_defined_says_so() -> None:
    """Of constant outputs there is no correlation, which says nothing about the model."""
    nothing = {n: Estimate(math.nan) for n in ("audio", "visual")}
    report = plain(nothing=Estimate(math.nan), shapley=nothing, shapley_share=nothing)
    assert any("With some inputs masked the accuracy is not defined" in t for t in report.findings)
    assert "no better than without" not in str(report)


def test_names_are_no_markup_and_fit() -> None:
    names = ("ecg[lead]", "[/x]", *(f"a rather long name {i}" for i in range(5)))
    values = {n: Estimate(0.9678, 0.9591, 0.9764) for n in names}
    report = plain(modalities=names, alone=values, removed=values, metric="[bold]")
    text = str(report)
    assert all(name in text for name in names) and "[bold] on 10 samples" in text
    assert text.count("0.968 (0.959–0.976)") >= 2 * len(names) and "…" not in text


def test_the_table_and_the_text_hold_what_there_is() -> None:
    report = made()
    titles = [title for title, _ in report.rows()]
    assert titles == [
        "alone (others masked)",
        "removed (masked)",
        "noise of severity 0.5 on it",
        "noise of severity 1 on it",
        "noise of severity 2 on it",
        "another model, trained on it alone",
        "Shapley value",
        "Shapley share",
        "probe of its encoder",
        "probe of one trained alone",
        "ratio of both probes",
    ]
    assert isinstance(report.table(), Table) and report.table().row_count == len(titles)
    text = str(report)
    joint = report.joint
    assert f"all modalities {joint.value:.3f} ({joint.low:.3f}–{joint.high:.3f})" in text
    assert all(title in text for title in titles)
    assert "accuracy on 90 samples (higher is better)" in text
    assert repr(report).startswith(f"ImbalanceReport(accuracy {joint.value:.3f} (")
    short = plain()
    assert [title for title, _ in short.rows()] == titles[:2]
    assert "lower is better" in str(plain(higher_is_better=False))


def test_findings_follow_from_the_intervals() -> None:
    def said(**more: Any) -> str:
        return " ".join(plain(**more).findings)

    assert "0.300 (0.200–0.400) without audio and 0.800" in said()
    assert "the model leans most on audio" in said(leans_on="audio")
    assert "do not say which one the model leans on" in said()
    # The metric is an error: the larger one is worse.
    errors = {"audio": Estimate(0.3, 0.2, 0.4), "visual": Estimate(0.8, 0.7, 0.85)}
    assert "0.800 (0.700–0.850) without visual and 0.300" in said(
        removed=errors, higher_is_better=False
    )
    bare = {n: Estimate(e.value) for n, e in errors.items()}
    assert "leans" not in said(removed=bare)
    undefined = {"audio": Estimate(math.nan), "visual": errors["visual"]}
    assert "is 0.800 (0.700–0.850) without visual and — without audio" in said(removed=undefined)
    assert "give" not in said() and "encoders= and unimodal_encoders= compare them" in said()

    def probed(low: float, high: float) -> Probes:
        ratio = Estimate((low + high) / 2, low, high)
        return Probes(Estimate(0.5, 0.4, 0.6), Estimate(0.5, 0.4, 0.6), ratio)

    both = said(probes={"audio": probed(0.9, 0.98), "visual": probed(0.6, 0.8)})
    assert "audio encoder are 0.940 (0.900–0.980) times as good" in both
    behind = {"audio": probed(0.9, 0.98), "visual": probed(0.6, 0.8)}
    assert headline(plain(probes=behind, leans_on="audio")) == (
        "The model leans most on audio. The visual and audio encoders have learnt less than "
        "trained alone (linear probes)."
    )
    assert headline(plain()) == ""
    behind["audio"] = probed(0.9, 1.1)
    assert headline(plain(probes=behind)) == (
        "The visual encoder has learnt less than trained alone (linear probes)."
    )
    assert both.count("it is behind") == 2 and "Furthest behind is visual." in both
    equal = said(probes={"audio": probed(0.6, 0.8), "visual": probed(0.6, 0.8)})
    assert equal.count("it is behind") == 2 and "Furthest" not in equal
    lost = Probes(Estimate(0.5), Estimate(0.0), Estimate(math.nan))
    assert "encoders= and unimodal_encoders= compare them" in said(probes={"audio": lost})
    assert "encoders= and" not in both
    none = said(probes={"audio": probed(0.9, 1.1), "visual": probed(1.1, 1.2)})
    assert "no difference can be seen" in none and "it is ahead" in none
    assert "behind" not in none


@pytest.mark.parametrize("suffix", [".png", ".html", ".json", ".HTML"])
def test_files_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    report = plain()
    path = tmp_path / f"report{suffix}"
    assert report.save(str(path)) == path
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    elif suffix == ".json":
        assert json.loads(content) == report.as_dict()
    else:
        assert content.startswith(b"<!doctype html>")


def test_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.png, \.html or \.json, got '.*pdf'"):
        plain().save(tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_long_history_is_shown_by_means() -> None:
    steps = [{"coefficients/audio": float(i), "step": 10 * i} for i in range(250)]
    report = mmfuse.imbalance_report(Added(audio=1.0, visual=0.4), DATA, history=steps, resamples=0)
    history = report.history
    assert history is not None and history.per_point == 3
    values = history.fields["coefficients"]["audio"]
    assert len(values) == len(history.steps) == 84
    assert values[:2] == [1, 4] and values[-1] == 249
    assert history.steps[:2] == [10, 40]


def test_a_history_from_a_training_run() -> None:
    nets = nn.ModuleDict({n: nn.Linear(3, 3) for n in INPUTS})
    ogm = mmfuse.OGM(nets)
    history: list[dict[str, float]] = []
    with mmfuse.ScalarLog(lambda scalars, step: history.append(scalars), every=2) as log:
        for step in range(3):
            logits = {n: net(INPUTS[n]) for n, net in nets.items()}
            loss = nn.functional.cross_entropy(logits["audio"], LABELS) + logits["visual"].mean()
            nets.zero_grad()
            log.add(step, ogm.backward(loss, logits, LABELS).as_dict())
    report = mmfuse.imbalance_report(
        Added(audio=1.0, visual=0.4), DATA, history=history, resamples=0
    )
    assert report.history is not None
    assert {"scores", "coefficients", "ratios"} <= set(report.history.fields)
    assert list(report.history.fields["scores"]) == ["audio", "visual"]
    seen = [h["coefficients/audio"] for h in history]
    assert report.history.fields["coefficients"]["audio"] == seen
