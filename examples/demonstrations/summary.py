"""A comparison's runs in figures: means, paired differences, a table."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from .data import DataError
from .measures import SEVERITIES
from .paired import LEVEL, difference, holm, least
from .settings import Drawn
from .ways import ONLY, RATE, at_rate, baseline_of, ways

Row = dict[str, str]
COLUMNS = {"method", "seed", "settings", "epoch", "accuracy"}
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
    p_holm: float | None  # None where nothing is claimed: a modality alone


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
        if not row.keys() >= COLUMNS or None in row.values():
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
    """Ways to train, in the usual order; without the baselines at other learning rates."""
    every = dict.fromkeys(row["method"] for row in rows if RATE not in row["method"])
    order = {way: place for place, way in enumerate(ways(()))}
    return sorted(every, key=lambda way: order.get(way, -1))


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


def paired(
    rows: Sequence[Row], method: str, baseline: str, epoch: str, measure: str
) -> tuple[list[float], list[float]]:
    """The values of both, over the seeds that both have."""
    ours, theirs = (values(rows, m, epoch, measure) for m in (method, baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[s] for s in seeds], [theirs[s] for s in seeds]


def compare(
    rows: Sequence[Row], views: Sequence[str], tuned: Mapping[str, Drawn]
) -> list[Compared]:
    """Every way to train against its baseline, over the seeds that both have.

    It is compared with the tuned baseline, and with the baseline at its own learning rate. Each of
    the two is a family for Holm's correction, by measure and epoch; a modality alone is in none.
    """
    own_rate = {method: at_rate(method, tuned) for method in names(rows)}
    pairs = [(method, baseline_of(method)) for method in own_rate]
    other = [(m, at) for m, at in own_rate.items() if at is not None and RATE in at]
    return [
        row
        for epoch in EPOCHS
        for measure in measures(views)
        for family in (pairs, other)
        for row in _family(rows, family, epoch, measure)
    ]


def _family(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str | None]], epoch: str, measure: str
) -> list[Compared]:
    found = []
    for method, baseline in pairs:
        if baseline is not None:
            ours, theirs = paired(rows, method, baseline, epoch, measure)
            if len(ours) > 1:
                mean = statistics.fmean(ours)
                found.append((method, baseline, mean, difference(ours, theirs)))
    claims = [method for method, *_ in found if not method.startswith(ONLY)]
    p_values = [each.p for method, *_, each in found if method in claims]
    corrected = dict(zip(claims, holm(p_values), strict=True))
    out = []
    for method, baseline, mean, each in found:
        low, middle, high = (round(x, 4) for x in (each.low, each.mean, each.high))
        p = None if method not in corrected else round(corrected[method], 4)
        numbers = (round(mean, 4), middle, low, high, p)
        out.append(Compared(method, baseline, epoch, measure, each.count, *numbers))
    return out


def too_few(table: Sequence[Compared]) -> list[str]:
    """Sentences about families in which so few seeds cannot give a p-value below 0.05."""
    families: dict[tuple[bool, str, str], list[int]] = {}
    for row in table:
        if row.p_holm is not None:
            key = (RATE in row.baseline, row.epoch, row.measure)
            families.setdefault(key, []).append(row.seeds)
    worst = max(((len(seeds), min(seeds)) for seeds in families.values()), default=(0, 0))
    comparisons, seeds = worst
    if not comparisons or comparisons * least(seeds) < LEVEL:
        return []
    return [
        f"{seeds} seeds are too few for {comparisons} comparisons: their smallest p-value is "
        f"{min(1.0, comparisons * least(seeds)):.2g} after Holm's correction; add seeds"
    ]


def write(path: Path, table: Sequence[Compared]) -> None:
    """Writes the differences as a csv file."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, asdict(table[0]) if table else (), lineterminator="\n")
        out.writeheader()
        out.writerows(asdict(row) for row in table)


def cells(table: Sequence[Compared], rows: Sequence[Row], views: Sequence[str]) -> list[list[str]]:
    """The differences for people: a heading, and lines for each way to train.

    The second line, where there is one, is the difference to the baseline at the way's own learning
    rate. All are after the last epoch, but for the accuracy, which is there at both.
    """
    found = {(row.method, row.baseline, row.epoch, row.measure): row for row in table}
    against: dict[str, list[str]] = {}
    for row in table:
        if row.baseline not in against.setdefault(row.method, []):
            against[row.method].append(row.baseline)
    probe = f"probe {weak(rows, views)}"
    shown = {("last", "accuracy"): "accuracy, last epoch"}
    shown[("selected", "accuracy")] = "accuracy, selected epoch"
    shown |= {("last", f"noise {SHOWN:g} {view}"): f"noise {SHOWN:g} {view}" for view in views}
    shown[("last", probe)] = probe
    out = [["method", "compared with", "seeds", "accuracy", *shown.values()]]
    for method in names(rows):
        clean = values(rows, method, "last", "accuracy").values()
        for baseline in against.get(method, [""]):
            numbers = [found.get((method, baseline, *key)) for key in shown]
            line = [method, baseline, str(len(clean)), f"{statistics.fmean(clean):.3f}"]
            out.append([*line, *("" if row is None else in_words(row) for row in numbers)])
    return out


CAPTION = (
    "Differences to what is in the second column, with 95 % t intervals over the seeds; "
    "* p < 0.05 by a sign-flip test after Holm's correction, over a column's lines with tuned "
    "baselines or over those with one at the method's learning rate; a modality alone has no test"
)


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


def sure(row: Compared) -> bool:
    """Says if the difference counts as more than chance."""
    return row.p_holm is not None and row.p_holm < LEVEL


def in_words(row: Compared) -> str:
    """'+0.012 [+0.003, +0.020] *'."""
    star = " *" if sure(row) else ""
    return f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]{star}"
