"""The picture of a report: panels that say how to read them."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._findings import headline, shown, together
from ._intervals import Estimate
from ._packages import package

if TYPE_CHECKING:
    from .summary import ImbalanceReport

_MARKERS = "os^Dvp"
_DPI, _LETTERS = 150, 84
# A name with dollar signs is no formula.
_AS_IT_IS = {"text.parse_math": False}
# Inches; beside other panels, and on a page, where a telephone shows it at half the size.
_WIDTH, _NARROW = 5.8, 4.4


class Style(NamedTuple):
    """Colours of a picture."""

    ink: str
    muted: str
    background: str
    grid: str
    modalities: tuple[str, ...]


# Okabe and Ito's, which people who confuse colours can tell apart; on black, lighter.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LIGHTER = ("#56B4E9", "#E69F00", "#2FBF93", "#E39AC4", "#FF7F45", "#9DB4FF")
LIGHT = Style("#1b1f24", "#57606a", "#ffffff", "#d8dee4", _COLOURS)
DARK = Style("#e6edf3", "#9ea7b3", "#161b22", "#30363d", _LIGHTER)


class Panel(NamedTuple):
    """One plot, whose curves have one meaning.

    Attributes:
        title: Of the plot.
        reading: How to read it, in a sentence or two.
        rows: Lines of text beside it, by which it needs more height.
        draw: Draws into axes.
    """

    title: str
    reading: str
    rows: int
    draw: Callable[[Any, Style], None]


def panels(report: ImbalanceReport) -> list[Panel]:
    """Those for which the report has numbers."""
    metric = report.metric[0].upper() + report.metric[1:]
    side = "right" if report.higher_is_better else "left"
    dots = _dots(report)
    found = [
        Panel(
            f"{metric}, by the inputs that are there",
            f"A dot further {side} is better. The dashed line is the model with all inputs masked.",
            len(dots),
            lambda ax, style: _draw_dots(ax, style, report, dots),
        )
    ]
    if report.noisy:
        found.append(
            Panel(
                f"{metric} with noise on one modality",
                "The others are clean; unless you chose another kind, 1 is as much noise as the "
                "input itself varies. A steep line is a modality that the model depends on; "
                "dashed: all inputs masked.",
                0,
                lambda ax, style: _draw_noise(ax, style, report),
            )
        )
    if report.shapley_share:
        found.append(
            Panel(
                "Shapley share of each modality",
                "How the gain over no input at all is shared out among them; together "
                "100\N{NO-BREAK SPACE}%.",
                len(report.modalities),
                lambda ax, style: _draw_shares(ax, style, report),
            )
        )
    if report.probes:
        found.append(
            Panel(
                "Linear probes of the frozen encoders",
                "Filled: the encoder of this model. Hollow: one trained on the modality alone. A "
                f"filled dot {'left' if report.higher_is_better else 'right'} of the hollow one is "
                "behind.",
                len(report.probes),
                lambda ax, style: _draw_probes(ax, style, report),
            )
        )
    readings = {
        "scores": "How well each modality alone did on the batch, as the method measured it.",
        "coefficients": "The method's number for each modality in each step; its documentation "
        "says what that is (of OGM a factor of the gradient: 1 leaves it alone).",
    }
    fields = report.history.fields if report.history else {}
    for name, reading in readings.items():
        if name in fields:
            found.append(_over_training(report, name, reading, fields[name]))
    return found


def _over_training(
    report: ImbalanceReport, name: str, reading: str, curves: Mapping[str, list[float]]
) -> Panel:
    assert report.history is not None
    per_point = report.history.per_point
    if per_point > 1:
        reading += f" A point is the mean of {per_point} steps."
    return Panel(
        f"{name.capitalize()} over training",
        reading,
        0,
        lambda ax, style: _draw_history(ax, style, report, name, curves),
    )


class _Dot(NamedTuple):
    label: str
    value: Estimate
    modality: str | None  # None for all
    other: bool = False  # of another model


def _dots(report: ImbalanceReport) -> list[_Dot]:
    two = len(report.modalities) == 2
    found = [_Dot("all modalities", report.joint, None)]
    for m, name in enumerate(report.modalities):
        label = f"{name} alone"
        if two:  # of two, the other is what is masked
            label += f" ({report.modalities[1 - m]} masked)"
        found.append(_Dot(label, report.alone[name], name))
    if not two:
        found += [_Dot(f"{n} masked", report.removed[n], n) for n in report.modalities]
    own = report.trained_alone.items()
    found += [_Dot(f"another model, trained on {n}", value, n, True) for n, value in own]
    return found


def _draw_dots(ax: Any, style: Style, report: ImbalanceReport, dots: Sequence[_Dot]) -> None:
    ax.axvline(report.nothing.value, color=style.muted, linestyle="--", linewidth=1)
    for row, dot in enumerate(dots):
        colour = style.ink if dot.modality is None else _colour(report, dot.modality, style)
        _interval(ax, dot.value, row, colour, style, marker="D" if dot.other else "o")
    _rows(ax, [dot.label for dot in dots], [dot.value for dot in dots], style)
    ax.set_xlabel(_axis(report))


def _draw_noise(ax: Any, style: Style, report: ImbalanceReport) -> None:
    for name, by in report.noisy.items():
        colour = _colour(report, name, style)
        points = [(0.0, report.joint), *sorted(by.items())]
        xs = [severity for severity, _ in points]
        marker = _MARKERS[report.modalities.index(name) % len(_MARKERS)]
        ys = [value.value for _, value in points]
        ax.plot(xs, ys, color=colour, marker=marker, markersize=5, label=f"noise on {name}")
        low = [value.value if value.low is None else value.low for _, value in points]
        high = [value.value if value.high is None else value.high for _, value in points]
        ax.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.axhline(report.nothing.value, color=style.muted, linestyle="--", linewidth=1)
    ax.set_xlabel("severity of the noise")
    ax.set_ylabel(_axis(report))
    _legend(ax, style)


def _draw_shares(ax: Any, style: Style, report: ImbalanceReport) -> None:
    names = list(report.shapley_share)
    percent = [_scaled(report.shapley_share[name], 100) for name in names]
    for row, (name, value) in enumerate(zip(names, percent, strict=True)):
        if not math.isnan(value.value):
            ax.barh(row, value.value, color=_colour(report, name, style), height=0.55)
            if value.low is not None and value.high is not None:
                ax.plot([value.low, value.high], [row, row], color=style.ink, linewidth=1.6)
    ax.axvline(0, color=style.muted, linewidth=1)
    texts = [shown(report.shapley_share[name], percent=True) for name in names]
    _rows(ax, names, percent, style, texts)
    ax.set_xlabel("share of the gain over no input (%)")
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0), max(right, 100))


def _draw_probes(ax: Any, style: Style, report: ImbalanceReport) -> None:
    texts = []
    for row, (name, probes) in enumerate(report.probes.items()):
        colour = _colour(report, name, style)
        if probes.alone is not None:
            ends = [probes.joint.value, probes.alone.value]
            ax.plot(ends, [row + 0.14, row - 0.14], color=colour, linewidth=1, alpha=0.5)
            _interval(ax, probes.alone, row - 0.14, colour, style, hollow=True)
        _interval(ax, probes.joint, row + 0.14, colour, style)
        texts.append(f"ratio {shown(probes.ratio)}" if probes.ratio else shown(probes.joint))
    _rows(ax, list(report.probes), [p.joint for p in report.probes.values()], style, texts)
    ax.set_xlabel(_axis(report))


def _draw_history(
    ax: Any,
    style: Style,
    report: ImbalanceReport,
    name: str,
    curves: Mapping[str, list[float]],
) -> None:
    assert report.history is not None
    for modality, values in curves.items():
        known = modality in report.modalities
        colour = _colour(report, modality, style) if known else None
        ax.plot(report.history.steps, values, color=colour, linewidth=1.3, label=_told(modality))
    ax.set_xlabel("training step")
    ax.set_ylabel(name[:-1])
    _legend(ax, style)


def _told(name: str) -> str:
    """The name in a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _legend(ax: Any, style: Style) -> None:
    """Above the axes, where it hides no curve."""
    where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "borderaxespad": 0.2}
    ax.legend(frameon=False, labelcolor=style.ink, fontsize=9, **where)


def _interval(
    ax: Any,
    value: Estimate,
    row: float,
    colour: str,
    style: Style,
    *,
    marker: str = "o",
    hollow: bool = False,
) -> None:
    if value.low is not None and value.high is not None:
        ax.plot([value.low, value.high], [row, row], color=colour, linewidth=2.2, alpha=0.6)
    face = style.background if hollow else colour
    ax.plot([value.value], [row], marker, color=colour, markerfacecolor=face, markersize=7)


def _rows(
    ax: Any,
    labels: Sequence[str],
    values: Sequence[Estimate],
    style: Style,
    texts: Sequence[str] | None = None,
) -> None:
    """Names on the left, numbers on the right, the first row on top."""
    ax.set_yticks(
        range(len(labels)),
        ["\n".join(textwrap.wrap(text, int(5 * ax.figure.get_figwidth()))) for text in labels],
    )
    ax.set_ylim(len(labels) - 0.5, -0.5)
    for row, value in enumerate(values):
        text = shown(value) if texts is None else texts[row]
        ax.annotate(
            text,
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=style.muted,
        )
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _scaled(value: Estimate, factor: float) -> Estimate:
    return Estimate(*(None if v is None else v * factor for v in value))  # type: ignore[arg-type]


def _axis(report: ImbalanceReport) -> str:
    return f"{report.metric} ({'higher' if report.higher_is_better else 'lower'} is better)"


def _colour(report: ImbalanceReport, name: str, style: Style) -> str:
    m = report.modalities.index(name)
    if len(report.modalities) <= len(style.modalities):
        return style.modalities[m]
    maps, colours = package("matplotlib"), package("matplotlib.colors")
    found: str = colours.to_hex(maps.colormaps["turbo"]((m + 0.5) / len(report.modalities)))
    return found


def png(report: ImbalanceReport) -> bytes:
    """All panels in one picture, with a heading and what the intervals are."""
    numpy: Any = package("numpy")
    found = panels(report)
    columns = min(2, len(found))
    rows = []
    for start in range(0, len(found), columns):
        beside = found[start : start + columns]
        height = max(map(_height, beside))
        drawn = [_pixels(_figure(panel, LIGHT, height, heading=True)) for panel in beside]
        blank = numpy.full_like(drawn[0], 255)
        rows.append(numpy.hstack([*drawn, *[blank] * (columns - len(drawn))]))
    width = _WIDTH * columns
    title = f"Imbalance report: {together(report.modalities)}"
    head = _strip(textwrap.shorten(title, 52 * columns), width, 0.5, 15, "bold", LIGHT.ink)
    said = textwrap.fill(headline(report), 70 * columns)
    if said:
        strip = 0.1 + 0.2 * (said.count("\n") + 1)
        rows.insert(0, _strip(said, width, strip, 10.5, "normal", LIGHT.ink))
    lines = textwrap.fill(caption(report), 78 * columns)
    foot = _strip(lines, width, 0.2 + 0.18 * (lines.count("\n") + 1), 9, "normal", LIGHT.muted)
    file = io.BytesIO()
    whole = numpy.vstack([head, *rows, foot])
    package("matplotlib.image").imsave(
        file, whole, format="png", dpi=_DPI, pil_kwargs={"optimize": True}
    )
    return file.getvalue()


def panel_png(panel: Panel, style: Style) -> bytes:
    """One panel, without title and reading, which stand beside it on a page."""
    file = io.BytesIO()
    _figure(panel, style, _height(panel), heading=False).savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def caption(report: ImbalanceReport) -> str:
    """Samples, and what the intervals are."""
    text = f"{report.samples:,} samples."
    if report.confidence is None:
        return text
    return (
        f"{text} Lines and bands beside a value: {100 * report.confidence:g}\N{NO-BREAK SPACE}% "
        "bootstrap intervals over samples; they say nothing of other training runs."
    )


def _height(panel: Panel) -> float:
    return max(3.3, 1.6 + 0.34 * panel.rows)


def _figure(panel: Panel, style: Style, height: float, *, heading: bool) -> Any:
    """A figure of one panel; with a heading its title and how to read it stand above the axes."""
    with package("matplotlib").rc_context(_AS_IT_IS):
        return _drawn(panel, style, height, heading)


def _drawn(panel: Panel, style: Style, height: float, heading: bool) -> Any:
    wrapped = textwrap.wrap(panel.reading, _LETTERS)
    head = 0.45 + 0.17 * len(wrapped) if heading else 0.0
    figure = package("matplotlib.figure").Figure(
        figsize=(_WIDTH if heading else _NARROW, height + 0.7 * heading),
        facecolor=style.background,
    )
    tall = figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0.03, 0, 0.96, 1 - head / tall))
    if heading:
        text = {"x": 0.03, "va": "top", "ha": "left"}
        figure.text(
            y=1 - 0.15 / tall, s=panel.title, color=style.ink, fontsize=11.5, weight="bold", **text
        )
        figure.text(y=1 - 0.4 / tall, s="\n".join(wrapped), color=style.muted, fontsize=8.5, **text)
    ax = figure.subplots()
    panel.draw(ax, style)
    ax.set_facecolor(style.background)
    ax.grid(color=style.grid, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(style.muted)
    ax.tick_params(colors=style.ink, labelsize=9)
    ax.xaxis.label.set_color(style.ink)
    ax.yaxis.label.set_color(style.ink)
    return figure


def _strip(text: str, width: float, height: float, size: float, weight: str, colour: str) -> Any:
    figure = package("matplotlib.figure").Figure(figsize=(width, height), facecolor="white")
    style = {"size": size, "weight": weight, "color": colour}
    figure.text(0.5, 0.5, text, ha="center", va="center", parse_math=False, **style)
    return _pixels(figure)


def _pixels(figure: Any) -> Any:
    """[height, width, RGBA]."""
    figure.set_dpi(_DPI)
    canvas = package("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return package("numpy").array(canvas.buffer_rgba())
