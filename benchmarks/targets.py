"""Targets of a run on a GPU, and what it reached: `python benchmarks/targets.py results.csv ...`.

Of several files the last one that has a row counts. A target that was missed is said to be
missed; the exit code is 0 all the same. `predicted` is what benchmarks/NOTES.md says for an H200.
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
# The rows of one case: title of the workload → row of the provider.
Rows = Mapping[str, Row]
Value = Callable[[Rows, str], float | None]

PROVIDER = "cuda"
DTYPE = "float32"
_TWO = "two ResNet-18 ("
_TWO_CHANNELS_LAST = "two ResNet-18 in channels_last"
_LARGE = "one tensor of 256 M"
_THOUSAND = "1,000 tensors"


def title_of(rows: Rows, beginning: str) -> str | None:
    """The workload's whole title."""
    return next((title for title in rows if title.startswith(beginning)), None)


def number(rows: Rows, workload: str, name: str) -> float | None:
    """A number of the provider's row on a workload, if it has one."""
    title = title_of(rows, workload)
    found = rows[title].get(name) if title else None
    return float(found) if found else None


def field(name: str, factor: float = 1.0) -> Value:
    """A number of the row itself."""

    def value(rows: Rows, workload: str) -> float | None:
        found = number(rows, workload, name)
        return None if found is None else factor * found

    return value


def of_contiguous(rows: Rows, workload: str) -> float | None:
    """How many times as long as with contiguous gradients: called or replayed, whichever is worse.

    None unless both are there.
    """
    ratios = []
    for name in ("median_ms", "replay_ms"):
        mine, other = (number(rows, title, name) for title in (workload, _TWO))
        if mine is None or other is None:
            return None
        ratios.append(mine / other)
    return max(ratios)


@dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        text: The line itself; `{}` stands for the limit.
        case: Of the benchmark.
        workload: The beginning of its title.
        value: The number that is compared.
        limit: The number that it is compared with.
        unit: How both are shown.
        at_least: True if the limit is the least, not the most, that is good.
        predicted: By benchmarks/NOTES.md, if it does.
    """

    text: str
    case: str
    workload: str
    value: Value
    limit: float
    unit: str
    at_least: bool = True
    predicted: str = "—"

    def show(self, value: float) -> str:
        """E.g. 25×, 90 %, 8."""
        if self.unit == "%":
            return f"{value:.0%}".replace("%", " %")
        # Some limits are near to one.
        digits = 0 if self.unit in ("", " µs") else 1 if value >= 2 else 3
        return f"{value:.{digits}f}{self.unit}"


def _copy(method: str, case: str, share: float, predicted: str) -> Target:
    text = f"{method} at least {{}} of copy"
    return Target(text, case, _LARGE, field("copy_share"), share, "%", predicted=predicted)


def _channels_last(method: str, case: str) -> Target:
    text = f"{method} in channels_last at most {{}} contiguous, called and replayed"
    return Target(text, case, _TWO_CHANNELS_LAST, of_contiguous, 1.15, "×", at_least=False)


TARGETS = (
    _copy("OGM", "update_scale", 0.9, "94 %"),
    _copy("OGM-GE", "ogm_ge", 0.8, "91 %"),
    _copy("InfoReg", "inforeg", 0.8, "93 %"),
    _copy("RedReg", "redreg", 0.8, "93 %"),
    Target(
        "OGM-GE's step at least {} official", "ogm_ge_step", _TWO, field("vs_official"), 25, "×"
    ),
    Target("OGM-GE at least {} foreach", "ogm_ge", _TWO, field("vs_foreach"), 4, "×"),
    Target(
        "OGM-GE, replayed, at least {} foreach", "ogm_ge", _TWO, field("replay_vs_foreach"), 4, "×"
    ),
    Target(
        "OGM-GE, replayed, at most {} on an H200",
        "ogm_ge",
        _TWO,
        field("replay_ms", 1e3),
        85,
        " µs",
        at_least=False,
        predicted="72 µs (65–80)",
    ),
    Target(
        "OGM-GE's step in at most {} launches",
        "ogm_ge_step",
        _TWO,
        field("launches"),
        8,
        "",
        at_least=False,
    ),
    Target(
        "OGM-GE's step with {} host syncs",
        "ogm_ge_step",
        _TWO,
        field("host_syncs"),
        0,
        "",
        at_least=False,
    ),
    Target(
        "OGM-GE, replayed, at least {} foreach",
        "ogm_ge",
        _THOUSAND,
        field("replay_vs_foreach"),
        10,
        "×",
        predicted="100×",
    ),
    Target(
        "OGM, replayed, at least {} foreach",
        "update_scale",
        _THOUSAND,
        field("replay_vs_foreach"),
        10,
        "×",
    ),
    _channels_last("OGM", "update_scale"),
    _channels_last("OGM-GE", "ogm_ge"),
    Target(
        # The case counts two reads; the target is by one.
        "histogram MI at least {} of copy, by one read",
        "mutual_information",
        "10⁷ pairs",
        field("copy_share", 0.5),
        0.6,
        "%",
        predicted="33 %",
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
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["dtype"] == DTYPE and row["provider"] == PROVIDER:
            cases.setdefault(row["case"], {})[row["workload"]] = row
    lines = ["| target | on | predicted | reached |", "|---|---|--:|--:|"]
    reached = 0
    for target in TARGETS:
        mine = cases.get(target.case, {})
        value = target.value(mine, target.workload)
        good = value is not None and (ge if target.at_least else le)(value, target.limit)
        reached += good
        shown = "not measured" if value is None else target.show(value)
        if value is not None and not good:
            shown = f"**missed**: {shown}"
        text = target.text.format(target.show(target.limit))
        title = title_of(mine, target.workload) or target.workload
        lines.append(f"| {text} | {title} | {target.predicted} | {shown} |")
    return [*lines, "", f"{reached} of {len(TARGETS)} targets reached."]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results.csv of benchmarks/run.py")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for path in options.results:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
