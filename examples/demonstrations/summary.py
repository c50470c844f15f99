"""A comparison's runs in figures: means, paired differences, a table."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from .data import DataError
from .measures import SEVERITIES
from .paired import difference, holm
from .ways import ONLY, baseline_of

Row = dict[str, str]
EPOCHS = ("last", "selected")
#: The severity that stands for all in the table.
SHOWN = SEVERITIES[2]


@dataclass(frozen=True)
class Compared:
    """One measure of one way to train against its baseline; a row of the table."""

    method: str
    baseline: str
    epoch: str
    measure: str
    seeds: int
    mean: float
    difference: float
    low: float
    high: float
    p_holm: float


def read(path: Path) -> list[Row]:
    """The rows of the table of runs; none if it is not there.

    Raises:
        DataError: it has other columns, or a line is cut off.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):
        if not {"method", "seed", "epoch", "accuracy"} <= row.keys() or None in row.values():
            raise DataError(
                f"line {number} of {path} is no run of a comparison: take the line out, or move "
                "the file away and train again"
            )
    return rows


def values(rows: Sequence[Row], method: str, epoch: str, measure: str) -> dict[int, float]:
    """Seed → value; the selected epoch has no probes."""
    return {
        int(row["seed"]): float(row[measure])
        for row in rows
        if row["method"] == method and row["epoch"] == epoch and row[measure]
    }


def names(rows: Sequence[Row]) -> list[str]:
    """Ways to train, in the order of the table."""
    return list(dict.fromkeys(row["method"] for row in rows))


def measures(views: Sequence[str]) -> list[str]:
    """The measures of a run."""
    noises = [f"noise {severity:g} {view}" for view in views for severity in SEVERITIES]
    return ["accuracy", *noises, *(f"probe {view}" for view in views)]


def weak(rows: Sequence[Row], views: Sequence[str]) -> str:
    """The modality that is less accurate by itself."""
    return min(
        views,
        key=lambda view: statistics.fmean(
            values(rows, f"{ONLY}{view}", "last", "accuracy").values() or [1.0]
        ),
    )


def compare(rows: Sequence[Row], views: Sequence[str]) -> list[Compared]:
    """Every way to train against its baseline, over the seeds that both have.

    Holm's correction is over all ways to train that are compared in one measure at one epoch.
    """
    out = []
    for epoch in EPOCHS:
        for measure in measures(views):
            pairs = []
            for method in names(rows):
                baseline = baseline_of(method)
                if baseline is None:
                    continue
                ours, theirs = (values(rows, m, epoch, measure) for m in (method, baseline))
                seeds = sorted(ours.keys() & theirs.keys())
                if len(seeds) > 1:
                    found = difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
                    mean = statistics.fmean(ours[s] for s in seeds)
                    pairs.append((method, baseline, mean, found))
            corrected = holm([found.p for *_, found in pairs])
            for (method, baseline, mean, found), p in zip(pairs, corrected, strict=True):
                numbers = (found.mean, found.low, found.high, p)
                out.append(
                    Compared(
                        method,
                        baseline,
                        epoch,
                        measure,
                        found.count,
                        mean,
                        *(round(x, 4) for x in numbers),
                    )
                )
    return out


def write(path: Path, table: Sequence[Compared]) -> None:
    """Writes the differences as a csv file."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, asdict(table[0]) if table else (), lineterminator="\n")
        out.writeheader()
        out.writerows(asdict(row) | {"mean": round(row.mean, 4)} for row in table)


def cells(table: Sequence[Compared], rows: Sequence[Row], views: Sequence[str]) -> list[list[str]]:
    """The differences for people: a heading, and one line for each way to train.

    All are after the last epoch, but for the accuracy, which is there at both.
    """
    found = {(row.method, row.epoch, row.measure): row for row in table}
    probe = f"probe {weak(rows, views)}"
    shown = {("last", "accuracy"): "accuracy, last epoch"}
    shown[("selected", "accuracy")] = "accuracy, selected epoch"
    shown |= {("last", f"noise {SHOWN:g} {view}"): f"noise {SHOWN:g} {view}" for view in views}
    shown[("last", probe)] = probe
    out = [["method", "compared with", "seeds", "accuracy", *shown.values()]]
    for method in names(rows):
        clean = values(rows, method, "last", "accuracy").values()
        numbers = [found.get((method, *key)) for key in shown]
        baseline = baseline_of(method) or ""
        line = [method, baseline, str(len(clean)), f"{statistics.fmean(clean):.3f}"]
        out.append([*line, *("" if row is None else in_words(row) for row in numbers)])
    return out


CAPTION = "Differences to what is in the second column, with 95 % intervals; * p < 0.05 after Holm"


def show(lines: Sequence[Sequence[str]]) -> Table:
    """The cells for the terminal."""
    out = Table(*lines[0], box=box.SIMPLE, title=CAPTION)
    for column in out.columns:
        column.no_wrap = True
    for line in lines[1:]:
        out.add_row(*line)
    return out


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The cells as a table in Markdown."""
    rule = ["---"] * 2 + ["--:"] * (len(lines[0]) - 2)
    rows = [lines[0], rule, *lines[1:]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{CAPTION}.\n\n{text}\n".replace("*", "\\*")


def publish(page: Path, name: str, text: str) -> None:
    """Replaces a table in a page, between two comments that begin and end with its name.

    Raises:
        DataError: the page has no such place.
    """
    end = name.partition(" ")[0]
    place = re.compile(rf"(<!-- {name}: .*?-->\n).*?(<!-- end of {end} -->)", re.DOTALL)
    changed, found = place.subn(lambda at: f"{at[1]}\n{text}\n{at[2]}", page.read_text())
    if found != 1:
        raise DataError(f"{page} must have one place for the {name!r}, it has {found}")
    page.write_text(changed)


def in_words(row: Compared) -> str:
    """'+0.012 [+0.003, +0.020] *'."""
    star = " *" if row.p_holm < 0.05 else ""
    return f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{star}"
