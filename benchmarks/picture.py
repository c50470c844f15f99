"""README's picture: how long a whole training step takes, as released and with mmfuse.

`make tables` draws it from the same results as the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.plot import LEGEND
from engine.rows import Row, ratio_of
from engine.workloads import WORKLOADS
from matplotlib.figure import Figure
from matplotlib.patches import Patch

#: Methods, by their training case.
SHOWN = {
    "OGM": "ogm_training",
    "OGM-GE": "ogm_ge_training",
    "MMPareto": "mmpareto_training",
    "InfoReg": "inforeg_training",
    "RedReg": "redreg_training",
}
NAME = "training_steps.png"
_BAR = 0.38
# The lighter red, against the green of LEGEND, of Okabe and Ito.
_RELEASED = "#D55E00"


def times(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Method → time of a step as released and with mmfuse, of one without the method.

    Raises:
        LookupError: a measurement is missing.
    """
    found = {}
    for method, case in SHOWN.items():
        unit = case, WORKLOADS["training"].title, "float32"
        of = {row.provider: row for row in rows if (row.case, row.workload, row.dtype) == unit}
        if not {"plain", "official", "cpu"} <= set(of):
            raise LookupError(
                f"the results have no {case} of a plain step, the released code and mmfuse"
            )
        official, ours = (ratio_of(of[name], of["plain"]).value for name in ("official", "cpu"))
        found[method] = (official, ours)
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Pairs of bars; what both begin at, 1, is training without the method."""
    shown = times(rows)
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    axis = figure.add_subplot()
    colours = (_RELEASED, LEGEND["cpu"][1])
    for i, pair in enumerate(shown.values()):
        for side, (value, colour) in enumerate(zip(pair, colours, strict=True)):
            y = i + (side - 0.5) * _BAR
            axis.barh(y, value, _BAR * 0.92, color=colour)
            axis.text(value + 0.03, y, f"{value:.2f}×", va="center", fontsize=9)
    axis.axvline(1, color="0.25", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xlabel("time of a training step, in steps without the method")
    axis.set_title("two ResNet-18, 16 samples of 64 × 64, CPU, float32", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.1)
    labels = {"the released code": _RELEASED, "mmfuse": LEGEND["cpu"][1]}
    axis.legend(handles=[Patch(color=c, label=n) for n, c in labels.items()], frameon=False)
    return figure


def write(rows: Sequence[Row], source: str, folder: Path) -> Path:
    """Draws the file; it holds the folder of its results as `Source`."""
    path = folder / NAME
    figure = draw(rows)
    figure.savefig(path, dpi=150, metadata={"Source": source, "Software": None})
    return path
