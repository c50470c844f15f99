"""What the runs of a comparison say: means, paired differences, a table."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

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
    """The rows of the table of runs; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def show(table: Sequence[Compared], rows: Sequence[Row], views: Sequence[str]) -> Table:
    """The differences at the last epoch for people, and the clean one at the selected epoch."""
    found = {(row.method, row.epoch, row.measure): row for row in table}
    shown = [("last", "accuracy"), ("selected", "accuracy")]
    shown += [("last", f"noise {SHOWN:g} {view}") for view in views]
    shown += [("last", f"probe {weak(rows, views)}")]
    out = Table(box=box.SIMPLE, title="Differences to the baseline, 95 % interval")
    out.caption = "* p < 0.05 after Holm's correction"
    for column in ("method", "baseline", "seeds", "accuracy"):
        out.add_column(column, no_wrap=True)
    for epoch, measure in shown:
        name = f"{measure}, {epoch} epoch" if measure == "accuracy" else measure
        out.add_column(name, no_wrap=True)
    for method in names(rows):
        first = found.get((method, *shown[0]))
        clean = values(rows, method, "last", "accuracy").values()
        cells = [method, first.baseline if first else "", str(len(clean))]
        cells.append(f"{statistics.fmean(clean):.3f}")
        for key in shown:
            row = found.get((method, *key))
            cells.append("" if row is None else in_words(row))
        out.add_row(*cells)
    return out


def in_words(row: Compared) -> str:
    """'+0.012 [+0.003, +0.020] *'."""
    star = " *" if row.p_holm < 0.05 else ""
    return f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{star}"
