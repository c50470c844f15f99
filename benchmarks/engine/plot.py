"""Bars of the speed-up over the released code, one panel per workload, one file per dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .report import show_ratio
from .rows import Row

#: Labels, and Okabe and Ito's colours, which people with any colour vision can tell apart.
LEGEND = {
    "foreach": ("best eager PyTorch", "#999999"),
    "compile": ("torch.compile", "#E69F00"),
    "reference": ("mmfuse reference, in PyTorch", "#56B4E9"),
    "triton": ("mmfuse Triton", "#CC79A7"),
    "cpu": ("mmfuse C++", "#009E73"),
    "cuda": ("mmfuse CUDA", "#0072B2"),
}
DEFINITION = (
    "times faster than the released code: its time over this one's, by the medians; logarithmic.\n"
    "Bars begin at 1; whiskers are this one's p20 and p80."
)
# Panels of fewer measurements than this share one.
_FEWEST = 3
OTHERS = "other workloads"
# Inches.
_BAR, _GAP, _PANEL_EXTRA, _WIDTH = 0.16, 0.12, 0.62, 8.0

#: Label → rows.
Groups = Mapping[str, Sequence[Row]]


def write_plots(rows: Sequence[Row], folder: Path, subtitle: str) -> list[str]:
    """Draws one file per dtype; returns the file names."""
    names = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype and row.vs_official is not None]
        mine = [row for row in mine if row.provider in LEGEND]
        if not mine:
            continue
        name = f"speedup_{dtype}.png"
        figure = draw(mine, f"Speed-up over the released code, {dtype}\n{subtitle}")
        figure.savefig(folder / name, dpi=110)
        names.append(name)
    return names


def panels(rows: Sequence[Row]) -> dict[str, Groups]:
    """Workload → its measurements; those of workloads with few of them share a panel.

    A label names the workload too where its panel does not, so that no two bars of a provider are
    under one.
    """
    cases: dict[str, set[str]] = {}
    for row in rows:
        cases.setdefault(row.workload, set()).add(row.case)
    found: dict[str, dict[str, list[Row]]] = {}
    shared: dict[str, list[Row]] = {}
    for row in rows:
        if len(cases[row.workload]) < _FEWEST:
            shared.setdefault(f"{row.title}\n{row.workload}", []).append(row)
        else:
            found.setdefault(row.workload, {}).setdefault(row.title, []).append(row)
    return {**found, **({OTHERS: shared} if shared else {})}


def draw(rows: Sequence[Row], title: str) -> Figure:
    """All panels, one below the other, each as high as its bars and with limits of its own."""
    made = panels(rows)
    heights = [_height(groups) + _PANEL_EXTRA for groups in made.values()]
    with mpl.rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 1.3), layout="constrained")
        grid = figure.subplots(len(made), 1, height_ratios=heights, squeeze=False)
        for ax, (name, groups) in zip(grid.ravel(), made.items(), strict=True):
            _draw_panel(ax, groups)
            ax.set_title(name, loc="left", fontsize=9, fontweight="bold")
        figure.supxlabel(DEFINITION, fontsize=7)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        shown = {row.provider for row in rows}
        handles = [
            Patch(color=colour, label=words)
            for provider, (words, colour) in LEGEND.items()
            if provider in shown
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=1, frameon=False)
    return figure


def _height(groups: Groups) -> float:
    return sum(len(rows) * _BAR + _GAP for rows in groups.values())


def whiskers(row: Row) -> tuple[float, float]:
    """How far the ratio lies above that of a call of p80, and below that of one of p20."""
    assert row.vs_official is not None
    return (
        max(0.0, row.vs_official * (1 - row.median_ms / row.p80_ms)),
        max(0.0, row.vs_official * (row.median_ms / row.p20_ms - 1)),
    )


def _draw_panel(ax: Axes, groups: Groups) -> None:
    y = 0.0
    ticks, ends = [], [1.0]
    for label, rows in groups.items():
        top = y
        for row in rows:
            ratio = row.vs_official
            assert ratio is not None
            low, high = whiskers(row)
            # Bars start at 1: those slower than official point to the left.
            ax.barh(
                y,
                ratio - 1,
                height=_BAR * 0.92,
                left=1,
                color=LEGEND[row.provider][1],
                xerr=[[low], [high]],
                error_kw={"elinewidth": 0.7, "capsize": 1.5, "ecolor": "black"},
            )
            end = ratio + high if ratio >= 1 else ratio - low
            ax.annotate(
                show_ratio(ratio),
                (end, y),
                xytext=(4 if ratio >= 1 else -4, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=7,
            )
            ends += [ratio - low, ratio + high]
            y += _BAR
        ticks.append(((top + y - _BAR) / 2, label))
        y += _GAP
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(y - _GAP, -_BAR)
    low, high = min(0.8, *ends), max(1.25, *ends)
    room = (high / low) ** 0.12  # for the numbers at both ends
    ax.set_xlim(low / room, high * room)
    few = high / low < 40
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
