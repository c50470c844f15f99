"""What a run on a GPU was meant to reach, and has: `python benchmarks/targets.py results.csv`.

A target that was missed is said to be missed; the exit code is 0 all the same.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, le
from pathlib import Path

Row = Mapping[str, str]
# The rows of one case on one workload: provider → row.
Rows = Mapping[str, Row]

PROVIDER = "cuda"
DTYPE = "float32"


def field(name: str, factor: float = 1.0) -> Callable[[Rows], float | None]:
    """A number of the provider's own row."""

    def value(rows: Rows) -> float | None:
        found = rows[PROVIDER].get(name)
        return factor * float(found) if found else None

    return value


def over(*others: str) -> Callable[[Rows], float | None]:
    """How many times faster than the fastest of these."""

    def value(rows: Rows) -> float | None:
        times = [float(rows[name]["median_ms"]) for name in others if name in rows]
        return min(times) / float(rows[PROVIDER]["median_ms"]) if times else None

    return value


@dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        text: What it says; `{}` is where the limit goes.
        case: Of the benchmark.
        workload: The beginning of its title.
        value: What is compared.
        limit: With which number.
        unit: How both are shown.
        at_least: Whether the limit is the least, not the most, that is good.
    """

    text: str
    case: str
    workload: str
    value: Callable[[Rows], float | None]
    limit: float
    unit: str
    at_least: bool = True

    def show(self, value: float) -> str:
        """E.g. 25×, 90 %, 8."""
        if self.unit == "%":
            return f"{value:.0%}".replace("%", " %")
        return f"{value:.{0 if self.unit == '' else 1}f}{self.unit}"


_TWO = "two ResNet-18 ("
_LARGE = "one tensor of 256 M"
TARGETS = (
    Target("OGM-GE at least {} official", "ogm_ge_step", _TWO, field("vs_official"), 25, "×"),
    Target(
        "OGM-GE at least {} the better of foreach and compile",
        "ogm_ge",
        _TWO,
        over("foreach", "compile"),
        4,
        "×",
    ),
    Target(
        "OGM-GE in at most {} launches",
        "ogm_ge_step",
        _TWO,
        field("launches"),
        8,
        "",
        at_least=False,
    ),
    Target("OGM at least {} of copy", "update_scale", _LARGE, field("copy_share"), 0.9, "%"),
    Target("OGM-GE at least {} of copy", "ogm_ge", _LARGE, field("copy_share"), 0.8, "%"),
    Target("InfoReg at least {} of copy", "update_pull", _LARGE, field("copy_share"), 0.8, "%"),
    Target("RedReg at least {} of copy", "redreg", _LARGE, field("copy_share"), 0.8, "%"),
    Target("at least {} foreach", "update_scale", "1,000 tensors", field("vs_foreach"), 10, "×"),
    Target(
        # The case counts two reads; the target is by one.
        "histogram MI at least {} of copy, by one read",
        "mutual_information",
        "10⁷ pairs",
        field("copy_share", 0.5),
        0.6,
        "%",
    ),
    Target(
        "OGM-GE's training step at most {} the plain one",
        "ogm_ge_training",
        "two ResNet-18, CREMA-D",
        field("of_plain"),
        1.02,
        "×",
        at_least=False,
    ),
)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of Markdown; the last one counts."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["dtype"] == DTYPE:
            grouped.setdefault((row["case"], row["workload"]), {})[row["provider"]] = row
    lines = ["| target | on | reached |", "|---|---|--:|"]
    reached = 0
    for target in TARGETS:
        found = [
            (title, mine)
            for (case, title), mine in grouped.items()
            if case == target.case and title.startswith(target.workload) and PROVIDER in mine
        ]
        title, value = (found[0][0], target.value(found[0][1])) if found else ("", None)
        good = value is not None and (ge if target.at_least else le)(value, target.limit)
        reached += good
        shown = "not measured" if value is None else target.show(value)
        if value is not None and not good:
            shown = f"**missed**: {shown}"
        text = target.text.format(target.show(target.limit))
        lines.append(f"| {text} | {title or target.workload} | {shown} |")
    return [*lines, "", f"{reached} of {len(TARGETS)} targets reached."]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of benchmarks/run.py")
    options = parser.parse_args(argv)
    with options.results.open(newline="") as file:
        print("\n".join(table(csv.DictReader(file))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
