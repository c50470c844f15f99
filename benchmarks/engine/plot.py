"""Bars of the speed-up over `official`, one panel per workload, one file per dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .report import Row, show_ratio

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = {
    "foreach": "#999999",
    "compile": "#E69F00",
    "reference": "#56B4E9",
    "triton": "#CC79A7",
    "cpu": "#009E73",
    "cuda": "#009E73",
}
# Inches.
_BAR, _GAP, _PANEL_EXTRA, _WIDTH = 0.16, 0.12, 0.7, 6.6


def write_plots(rows: Sequence[Row], folder: Path, subtitle: str) -> list[str]:
    """Draws one file per dtype; returns the file names."""
    names = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [
            row for row in rows if row.dtype == dtype and row.provider not in ("plain", "official")
        ]
        mine = [row for row in rows if row.dtype == dtype and row.vs_official is not None]
        mine = [row for row in mine if row.provider not in ("plain", "official")]
        if not mine:
            continue
        name = f"speedup_{dtype}.png"
        _figure(mine, f"Speed-up over the official code, {dtype}\n{subtitle}").savefig(
            folder / name, dpi=150
        )
        names.append(name)
    return names


def _figure(rows: Sequence[Row], title: str) -> Figure:
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        # Calls that only wait for launches share a panel.
        small = row.gb_per_s is None and row.floor_bytes > 0
        label = f"{row.title}\n{row.workload}" if small else row.title
        panels.setdefault("small tensors" if small else row.workload, []).append((label, row))
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    bars = [_groups(panel) for panel in panels.values()]
    heights = [
        max(_height(groups) + _PANEL_EXTRA for groups in bars[i * across : (i + 1) * across])
        for i in range(down)
    ]
    with mpl.rc_context({"font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_WIDTH * across, sum(heights) + 1.0), layout="constrained")
        grid = figure.subplots(down, across, height_ratios=heights, sharex=True, squeeze=False)
        axes = grid.ravel()
        for n, (ax, name, groups) in enumerate(zip(axes, panels, bars, strict=False)):
            # Panels side by side share their scale, so that all bars are equally thick.
            _draw(ax, groups, depth=heights[n // across] - _PANEL_EXTRA)
            ax.tick_params(labelbottom=True)
            ax.set_title(name, loc="left", fontsize=9, fontweight="bold")
        ratios = [row.vs_official for row in rows]
        low, high = min(0.8, *ratios), max(1.25, *ratios)
        room = (high / low) ** 0.17  # for the numbers at both ends
        axes[0].set_xlim(low / room, high * room)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.supxlabel("times faster than official, logarithmic", fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        shown = {row.provider for row in rows}
        handles = [Patch(color=c, label=p) for p, c in _COLOURS.items() if p in shown]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def _groups(panel: Sequence[tuple[str, Row]]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for label, row in panel:
        groups.setdefault(label, []).append(row)
    return groups


def _height(groups: Mapping[str, Sequence[Row]]) -> float:
    return sum(len(rows) * _BAR + _GAP for rows in groups.values())


def _draw(ax: Axes, groups: Mapping[str, Sequence[Row]], depth: float) -> None:
    y = 0.0
    ticks = []
    for label, rows in groups.items():
        top = y
        for row in rows:
            ratio = row.vs_official
            # From 1 outwards: what is slower than official points to the left.
            ax.barh(y, ratio - 1, height=_BAR * 0.92, left=1, color=_COLOURS[row.provider])
            ax.annotate(
                show_ratio(ratio),
                (ratio, y),
                xytext=(3 if ratio >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=7,
            )
            y += _BAR
        ticks.append(((top + y - _BAR) / 2, label))
        y += _GAP
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(depth - _GAP, -_BAR)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
