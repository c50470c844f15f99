"""The figures of a comparison: intervals, accuracy against noise, weak probe against accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .measures import SEVERITIES
from .summary import Compared, Row, names, paired, sure, values, weak
from .tasks import Task
from .ways import ENSEMBLE, JOINT, ONLY, OWN_LOSSES, RATE, method_of

matplotlib.use("Agg")  # draws to a file; needs no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

#: Baseline → colour; the same in all figures.
COLOURS = {JOINT: "tab:blue", OWN_LOSSES: "tab:orange"}
#: Ways to train whose curves are named in every figure.
CURVES = {JOINT: "black", OWN_LOSSES: "tab:orange", ENSEMBLE: "tab:purple"}
BEST = ("tab:green", "tab:blue", "tab:red")


def draw(folder: Path, task: Task, rows: Sequence[Row], table: Sequence[Compared]) -> list[Path]:
    """Draws all figures into the folder."""
    rows = complete(rows)
    seeds = len({row["seed"] for row in rows})
    title = f"{task.title}: {seeds} seeds, each with a split of its own"
    return [
        forest(folder / "forest.png", title, table),
        severities(folder / "noise.png", title, task, rows),
        tradeoff(folder / "probes.png", title, task, rows, table),
    ]


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows of the seeds that all ways have, so that means are of the same data."""
    ways = {row["method"] for row in rows}
    of: dict[str, set[str]] = {}
    for row in rows:
        of.setdefault(row["seed"], set()).add(row["method"])
    return [row for row in rows if of[row["seed"]] == ways]


def bare(axis: Axes) -> None:
    """Takes away what carries nothing."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)


def save(figure: plt.Figure, path: Path) -> Path:
    """Writes and closes it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def forest(path: Path, title: str, table: Sequence[Compared]) -> Path:
    """Difference in clean accuracy with its interval, one line for each way to train."""
    panels = [
        ("last", "after the last epoch"),
        ("selected", "at the epoch that validation selects"),
    ]
    first = [row for row in table if row.epoch == "last" and row.measure == "accuracy"]
    shown = [row for row in first if not row.method.startswith(ONLY)]
    order = [
        row.method
        for baseline in (OWN_LOSSES, JOINT)
        for row in sorted(shown, key=lambda row: row.difference)
        if row.baseline == baseline
    ]
    height = 0.27 * len(order) + 1.7
    figure, axes = plt.subplots(
        1, 2, figsize=(10.5, height), sharex=True, sharey=True, layout="constrained"
    )
    found = {
        (row.method, row.epoch, RATE in row.baseline): row
        for row in table
        if row.measure == "accuracy"
    }
    tuned = [row for (method, _, alike), row in found.items() if method in order and not alike]
    margin = 0.1 * (max(row.high for row in tuned) - min(row.low for row in tuned))
    low = min(0.0, *(row.low for row in tuned)) - margin
    high = max(0.0, *(row.high for row in tuned)) + margin
    for axis, (epoch, what) in zip(axes, panels, strict=True):
        for place, method in enumerate(order):
            row = found.get((method, epoch, False))
            if row is None:
                continue
            colour = COLOURS[row.baseline]
            axis.plot((row.low, row.high), (place, place), color=colour, linewidth=1.6)
            axis.plot(
                row.difference,
                place,
                "o",
                color=colour,
                markerfacecolor=colour if sure(row) else "white",
                markersize=6,
            )
            alike = found.get((method, epoch, True))
            if alike is not None:
                # A baseline that does not train at this rate must not shrink all the others.
                x = min(max(alike.difference, low), high)
                mark = "x" if x == alike.difference else ">" if x == high else "<"
                axis.plot(x, place, mark, color="0.3", markersize=6)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set(title=what, xlabel="difference in test accuracy; right of 0: better")
        axis.title.set_size("medium")
        bare(axis)
    axes[0].set_yticks(range(len(order)), order)
    line = plt.Line2D
    keys = [
        line([], [], color=colour, marker="o", label=f"compared with {baseline}")
        for baseline, colour in COLOURS.items()
    ]
    keys[1].set_label(f"compared with joint + {OWN_LOSSES}")
    for face, label in (("0.4", "p < 0.05 after Holm's correction"), ("white", "p ≥ 0.05")):
        keys.append(line([], [], color="0.4", marker="o", ls="", markerfacecolor=face, label=label))
    label = "baseline at the method's learning rate (arrow: beyond)"
    keys.append(line([], [], color="0.3", marker="x", ls="", label=label))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{title}\nmean of paired differences, 95 % t interval", fontsize=11)
    return save(figure, path)


def mean(rows: Sequence[Row], method: str, measure: str, epoch: str = "last") -> float:
    """Over all seeds."""
    return statistics.fmean(values(rows, method, epoch, measure).values())


def change(rows: Sequence[Row], method: str, measure: str) -> float:
    """The mean difference to joint training, over the seeds that both have."""
    ours, theirs = paired(rows, method, JOINT, "last", measure)
    return statistics.fmean(ours) - statistics.fmean(theirs) if ours else float("nan")


def severities(path: Path, title: str, task: Task, rows: Sequence[Row]) -> Path:
    """Accuracy against the noise on each modality; the three best methods are named."""
    shown = [method for method in names(rows) if not method.startswith(ONLY)]

    def average(method: str) -> float:
        noises = [f"noise {s:g} {view}" for s in SEVERITIES for view in task.views]
        return statistics.fmean(mean(rows, method, noise) for noise in noises)

    ranked = sorted((m for m in shown if method_of(m)), key=average, reverse=True)
    named = {m: colour for m, colour in CURVES.items() if m in shown}
    named |= dict(zip(ranked[:3], BEST, strict=False))
    figure, axes = plt.subplots(
        1, len(task.views), figsize=(4.6 * len(task.views), 4.4), sharey=True, layout="constrained"
    )
    for axis, view in zip(axes, task.views, strict=True):
        for method in sorted(shown, key=lambda m: m in named):
            measures = ["accuracy", *(f"noise {s:g} {view}" for s in SEVERITIES)]
            heights = [mean(rows, method, measure) for measure in measures]
            style = {"color": "0.8", "linewidth": 0.9}
            if method in named:
                style = {"color": named[method], "linewidth": 2, "marker": "o", "markersize": 4}
                style["linestyle"] = "-" if method_of(method) else "--"
            axis.plot(range(len(heights)), heights, **style)
        axis.set_xticks(range(len(SEVERITIES) + 1), ["none", *(f"{s:g}" for s in SEVERITIES)])
        axis.set(title=f"noise on the {view}", xlabel="noise, in standard deviations of the data")
        axis.title.set_size("medium")
        bare(axis)
    axes[0].set_ylabel("test accuracy, last epoch")
    keys = [
        plt.Line2D([], [], color=c, label=m, ls="-" if method_of(m) else "--", linewidth=2)
        for m, c in named.items()
    ]
    keys.append(plt.Line2D([], [], color="0.8", label="every other way to train"))
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"{title}\ndashed: baselines; solid, in colour: the three methods with the best mean",
        fontsize=10,
    )
    return save(figure, path)


def tradeoff(
    path: Path, title: str, task: Task, rows: Sequence[Row], table: Sequence[Compared]
) -> Path:
    """Gain of the weak modality's probe against the gain in clean accuracy, over joint training."""
    view = weak(rows, task.views)
    shown = [m for m in names(rows) if m != JOINT and not m.startswith(ONLY)]
    points = [
        (method, change(rows, method, "accuracy"), change(rows, method, f"probe {view}"))
        for method in shown
    ]
    baselines = {row.method: row.baseline for row in table if RATE not in row.baseline}
    figure, axis = plt.subplots(figsize=(8.6, 6.2), layout="constrained")
    axis.axhline(0, color="0.3", linewidth=1)
    axis.axvline(0, color="0.3", linewidth=1)
    for method, x, y in points:
        colour = COLOURS[baselines.get(method, JOINT)]
        own = baselines.get(method) == OWN_LOSSES or method.startswith(OWN_LOSSES)
        axis.plot(
            x, y, "o" if method_of(method) else "s", color=COLOURS[OWN_LOSSES] if own else colour
        )
    axis.plot(0, 0, "s", color="black")
    axis.annotate(JOINT, (0, 0), (5, -11), textcoords="offset points", fontsize=8)
    only = change(rows, f"{ONLY}{view}", f"probe {view}")
    axis.axhline(only, color="tab:purple", linestyle=":", linewidth=1.2)
    axis.set(
        xlabel="difference in test accuracy to joint training",
        ylabel=f"difference in the probe of the {view}'s encoder to joint training",
    )
    bare(axis)
    label(axis, points)
    axis.annotate(
        f"an encoder trained on the {view} alone",
        (1, only),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="tab:purple",
    )
    line = plt.Line2D
    keys = [
        line([], [], color=COLOURS[JOINT], marker="o", ls="", label="the joint loss alone"),
        line([], [], color=COLOURS[OWN_LOSSES], marker="o", ls="", label="unimodal losses as well"),
        line([], [], color="0.4", marker="o", ls="", label="method"),
        line([], [], color="0.4", marker="s", ls="", label="baseline"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{title}, last epoch\nthe {view} is the weak modality", fontsize=11)
    return save(figure, path)


def label(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names the points, each to the side where it covers no other name."""
    axis.figure.canvas.draw()
    taken: list[tuple[float, float, float, float]] = []
    dots = [axis.transData.transform((x, y)) for _, x, y in points]
    taken += [(x - 7, y - 7, x + 7, y + 7) for x, y in dots]
    for (name, x, y), (px, py) in sorted(
        zip(points, dots, strict=True), key=lambda pair: -pair[0][2]
    ):
        width, height = 4.9 * len(name) + 4, 11.0
        choices = [
            (dx if dx > 0 else dx - width, dy)
            for reach in (1, 2, 3, 4, 6)
            for dx, dy in (
                (7, -5),
                (-7, -5),
                (7, 7 * reach),
                (7, -9 * reach),
                (-7, 7 * reach),
                (-7, -9 * reach),
            )
        ]
        for dx, dy in choices:
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            if not any(
                box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
            ):
                break
        taken.append(box)
        axis.annotate(
            name,
            (x, y),
            (dx * 72 / axis.figure.dpi, dy * 72 / axis.figure.dpi),
            textcoords="offset points",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5}
            if abs(dy) > 10
            else None,
        )
