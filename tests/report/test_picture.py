"""The picture: which panels there are, what is in them, and that they can be told apart."""

from __future__ import annotations

import io
from typing import Any

import pytest

# A machine that runs the tests of a GPU may not have it.
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from mmfuse.report._history import History
from mmfuse.report.picture import DARK, LIGHT, Panel, panel_png, panels, png
from mmfuse.report.summary import Estimate, ImbalanceReport, Probes


def reported(count: int = 2, **more: Any) -> ImbalanceReport:
    names = tuple(("audio", "visual", "text", *(f"sensor {i}" for i in range(20)))[:count])
    values = {n: Estimate(0.5 + 0.02 * i, 0.45 + 0.02 * i, 0.6) for i, n in enumerate(names)}
    base: dict[str, Any] = {
        "metric": "accuracy",
        "higher_is_better": True,
        "samples": 1234,
        "modalities": names,
        "confidence": 0.95,
        "joint": Estimate(0.9, 0.85, 0.95),
        "nothing": Estimate(0.1, 0.08, 0.12),
        "alone": values,
        "removed": values,
        "noisy": {n: {1.0: Estimate(0.7, 0.6, 0.8), 2.0: values[n]} for n in names},
        "trained_alone": values,
        "shapley": values,
        "shapley_share": {n: Estimate(1 / count, 0.0, 1.0) for n in names},
        "probes": {n: Probes(values[n], Estimate(0.8, 0.7, 0.9), Estimate(0.7)) for n in names},
        "history": History(
            [0.0, 1.0, 2.0],
            3,
            {
                "scores": {key: [0.1, 0.2, 0.3] for key in names},
                "coefficients": {key: [1.0, 0.5, 0.2] for key in names},
                "ratios": {key: [1.0, 2.0, 3.0] for key in names},
            },
        ),
    }
    return ImbalanceReport(**{**base, **more})


def drawn(panel: Panel) -> Any:
    ax = Figure().subplots()
    panel.draw(ax, LIGHT)
    return ax


def test_a_panel_for_what_there_is_and_no_other() -> None:
    titles = [panel.title for panel in panels(reported())]
    assert titles == [
        "Accuracy, by the inputs that are there",
        "Accuracy with noise on one modality",
        "Shapley share of each modality",
        "Linear probes of the frozen encoders",
        "Scores over training",
        "Coefficients over training",
    ]
    nothing: dict[str, Any] = {
        "noisy": {},
        "trained_alone": {},
        "shapley": {},
        "shapley_share": {},
        "probes": {},
        "history": None,
    }
    assert [panel.title for panel in panels(reported(**nothing))] == titles[:1]


def labels_of(ax: Any) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in ax.get_yticklabels()]


def test_dots_are_the_numbers_beside_their_names() -> None:
    report = reported()
    ax = drawn(panels(report)[0])
    assert labels_of(ax) == [
        "all modalities",
        "audio alone (visual masked)",
        "visual alone (audio masked)",
        "another model, trained on audio",
        "another model, trained on visual",
    ]
    dots = [line for line in ax.lines if line.get_marker() in ("o", "D")]
    assert [line.get_xdata()[0] for line in dots] == [0.9, 0.5, 0.52, 0.5, 0.52]
    assert [line.get_ydata()[0] for line in dots] == [0, 1, 2, 3, 4]
    assert ax.get_ylim() == (4.5, -0.5), "the first row is on top"
    assert ax.lines[0].get_xdata() == [0.1, 0.1] and ax.lines[0].get_linestyle() == "--"
    assert ax.get_xlabel() == "accuracy (higher is better)"
    assert next(text.get_text() for text in ax.texts) == "0.900 (0.850–0.950)"
    three = labels_of(drawn(panels(reported(3))[0]))
    assert three[1:7] == [
        "audio alone",
        "visual alone",
        "text alone",
        "audio masked",
        "visual masked",
        "text masked",
    ]


def test_noise_starts_at_the_clean_model() -> None:
    ax = drawn(panels(reported())[1])
    assert list(ax.lines[0].get_xdata()) == [0, 1, 2]
    assert list(ax.lines[0].get_ydata()) == [0.9, 0.7, 0.5]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "noise on audio",
        "noise on visual",
    ]


def test_shares_are_bars_in_percent() -> None:
    ax = drawn(panels(reported(4))[2])
    assert [bar.get_width() for bar in ax.patches] == [25] * 4
    assert ax.get_xlabel().endswith("(%)") and ax.get_xlim()[1] >= 100


def test_probes_of_both_encoders() -> None:
    report = reported()
    ax = drawn(panels(report)[3])
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    hollow = [d for d in dots if to_hex(d.get_markerfacecolor()) == LIGHT.background]
    assert [d.get_xdata()[0] for d in hollow] == [0.8, 0.8]
    assert [d.get_xdata()[0] for d in dots if d not in hollow] == [0.5, 0.52]
    assert ax.texts[0].get_text() == "ratio 0.700"
    lower = panels(reported(higher_is_better=False))[3]
    assert (
        "right of the hollow" in lower.reading and "left of the hollow" in panels(report)[3].reading
    )


def test_curves_over_training() -> None:
    scores, coefficients = panels(reported())[4:]
    assert list(drawn(coefficients).lines[0].get_ydata()) == [1.0, 0.5, 0.2]
    assert drawn(scores).get_ylabel() == "score" and drawn(scores).get_xlabel() == "training step"
    assert "mean of 3 steps" in scores.reading


@pytest.mark.parametrize("style", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("count", [2, 6, 9])
def test_modalities_have_colours_of_their_own_in_all_panels(style: Any, count: int) -> None:
    used = []
    for panel in panels(reported(count)):
        ax = Figure().subplots()
        panel.draw(ax, style)
        marks = ax.patches or [line for line in ax.lines if line.get_linestyle() != "--"]
        used.append({to_hex(m.get_facecolor() if ax.patches else m.get_color()) for m in marks})
    of_bars = used[2] - {style.ink}
    assert len(of_bars) == count
    assert all(of_bars <= colours for colours in used)


def pixels(content: bytes) -> Any:
    return imread(io.BytesIO(content), format="png")


@pytest.mark.slow
def test_the_whole_picture_is_wide_enough_to_read() -> None:
    picture = pixels(png(reported(3)))
    height, width = picture.shape[:2]
    assert 1500 < width < 2500 and height > width / 2
    # Nothing runs out of the picture: its edges are blank.
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert bool((edge[..., :3] == 1).all())
    single = pixels(png(reported(noisy={}, shapley_share={}, probes={}, history=None)))
    assert single.shape[1] == pytest.approx(width / 2, abs=2)


def test_panels_for_a_page_are_dark_or_light() -> None:
    panel = panels(reported())[0]
    light, dark = (pixels(panel_png(panel, style)) for style in (LIGHT, DARK))
    assert light.shape == dark.shape
    assert to_hex(light[0, 0]) == LIGHT.background and to_hex(dark[0, 0]) == DARK.background


def test_names_are_no_formulas() -> None:
    """Matplotlib would take what stands between two dollar signs for one, and fail on it."""
    names = ("$\\frac$", "_hidden$")
    values = {n: Estimate(0.5, 0.4, 0.6) for n in names}
    report = reported(
        modalities=names,
        alone=values,
        removed=values,
        noisy={n: {1.0: Estimate(0.4)} for n in names},
        trained_alone=values,
        shapley_share=values,
        probes={},
        history=None,
    )
    assert png(report).startswith(b"\x89PNG")
    assert panel_png(panels(report)[0], DARK).startswith(b"\x89PNG")


@pytest.mark.slow
def test_many_and_long_names() -> None:
    report = reported(20)
    assert pixels(png(report)).shape[0] > 2000
    long = "the accelerometer of the left wrist, in three directions"
    names = {"modalities": (long, "gyroscope")}
    values = {n: Estimate(0.5, 0.4, 0.6) for n in names["modalities"]}
    report = reported(
        **names,
        alone=values,
        removed=values,
        noisy={},
        trained_alone=values,
        shapley_share=values,
        probes={},
        history=None,
    )
    picture = pixels(png(report))
    for edge in (picture[:, 0], picture[:, -1]):
        assert bool((edge[..., :3] == 1).all())
