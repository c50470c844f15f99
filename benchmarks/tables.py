"""The documents' tables, from one commit's results: `make tables RESULTS=benchmarks/results/...`.

README.md has one table and a picture, `docs/speed.md` the other tables. This writes what stands
between `<!-- table NAME: FOLDER -->` and `<!-- end of table -->`; the measurements are those of
`python benchmarks/run.py --plan readme`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import picture
from cases import CASES, WORKLOADS
from cases.adapters import LOOPS
from cases.overhead import SETUPS
from engine import results
from engine.measure import MAX_SAMPLES
from engine.plan import Plan
from engine.report import NO_NUMBER, show_ratio, show_time
from engine.rows import Row
from engine.training_case import TrainingCase

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/speed.md")
PICTURES = ROOT / "docs" / "images"
_TABLE = re.compile(r"(<!-- table (\w+): (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Unit = tuple[str, str, str]
Rows = Mapping[str, Row]  # by the provider, of one measurement


@dataclass(frozen=True)
class Line:
    """One measurement, and its name in the documents."""

    text: str
    case: str
    workload: str = "resnet18"
    dtype: str = "float32"
    #: Left out where the results are older than it.
    optional: bool = False
    #: The case of the kernels alone, on ResNet-18, beside that of a whole step.
    kernels: str | None = None

    @property
    def unit(self) -> Unit:
        """Case, workload and dtype."""
        return self.case, self.workload, self.dtype

    @property
    def units(self) -> list[Unit]:
        """All of its measurements."""
        return [self.unit] + ([(self.kernels, "resnet18", self.dtype)] if self.kernels else [])


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        lines: Its measurements.
        columns: Head → what it shows of one.
    """

    lines: Sequence[Line]
    columns: Mapping[str, Callable[[Rows], str]]

    def markdown(self, rows: Sequence[Row]) -> list[str]:
        """Head and rows; without columns that the results know nothing of.

        Raises:
            LookupError: a measurement is missing.
        """
        shown: list[tuple[str, list[str]]] = []
        for line in self.lines:
            try:
                found = dict(rows_of(rows, line.unit))
                for unit in line.units[1:]:
                    kernels = rows_of(rows, unit)
                    found |= {f"kernels: {name}": row for name, row in kernels.items()}
            except LookupError:
                if line.optional:
                    continue
                raise
            shown.append((line.text, [show(found) for show in self.columns.values()]))
        cells = [row for _, row in shown]
        known = [i for i in range(len(self.columns)) if any(row[i] != NO_NUMBER for row in cells)]
        heads = [head for i, head in enumerate(self.columns) if i in known]
        out = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
        out += [f"| {text} | " + " | ".join(row[i] for i in known) + " |" for text, row in shown]
        return out


def rows_of(rows: Sequence[Row], unit: Unit) -> Rows:
    """Provider → row.

    Raises:
        LookupError: the measurement is missing.
    """
    case, workload, dtype = unit
    title = WORKLOADS[workload].title
    found = {r.provider: r for r in rows if (r.case, r.workload, r.dtype) == (case, title, dtype)}
    if not found:
        raise LookupError(f"there is no {case} on {workload}, {dtype}")
    return found


def _of(provider: str, show: Callable[[Row], str]) -> Callable[[Rows], str]:
    return lambda rows: show(rows[provider]) if provider in rows else NO_NUMBER


def _share(row: Row) -> str:
    return NO_NUMBER if row.copy_share is None else f"{row.copy_share:.0%}".replace("%", " %")


def _host(row: Row) -> str:
    return NO_NUMBER if row.host_us is None else show_time(row.host_us / 1e3)


def _mib(row: Row, less: float | None = 0.0) -> str:
    if row.extra_mib is None or less is None:
        return NO_NUMBER
    mib = row.extra_mib - less
    return f"{mib:.{1 if 0.05 <= abs(mib) < 10 else 0}f}".replace("-0", "0")


def _over_plain(provider: str) -> Callable[[Rows], str]:
    return lambda rows: _of(provider, lambda r: _mib(r, rows["plain"].extra_mib))(rows)


def _memory(rows: Rows) -> str:
    return " / ".join(_of(provider, _mib)(rows) for provider in ("official", "foreach", "cpu"))


_SPEED = {
    "× official": _of("cpu", lambda r: show_ratio(r.vs_official)),
    "× foreach": _of("cpu", lambda r: show_ratio(r.vs_foreach)),
    "of copy": _of("cpu", _share),
    "host": _of("cpu", _host),
    "busy p90: foreach": _of("foreach", lambda r: show_ratio(r.busy_p90)),
    "busy p90": _of("cpu", lambda r: show_ratio(r.busy_p90)),
    "MiB: official / foreach / mmfuse": _memory,
}
_STEPS = {
    "× official": _of("cpu", lambda r: show_ratio(r.vs_official)),
    "of plain: official": _of("official", lambda r: show_ratio(r.of_plain)),
    "of plain": _of("cpu", lambda r: show_ratio(r.of_plain)),
    "more MiB: official": _over_plain("official"),  # than a plain step
    "more MiB": _over_plain("cpu"),
}


def _own(row: Row) -> str:
    return NO_NUMBER if row.own_us is None else show_time(row.own_us / 1e3)


def _median(row: Row) -> str:
    return show_time(row.median_ms)


def _steps() -> list[Line]:
    """Each training step that the catalogue has."""
    made = [c for c in CASES.values() if isinstance(c, TrainingCase) and not c.named_only]
    return [Line(case.title.split(":")[0], case.name, "training", optional=True) for case in made]


def _with_method(name: str) -> Callable[[Rows], str]:
    def show(rows: Rows) -> str:
        row = rows.get(name)
        if row is None:
            return NO_NUMBER
        reduced = f" ({row.reduced})" if row.reduced else ""
        return f"{show_ratio(row.of_plain)}{reduced}"

    return show


_BOTH = {
    "kernels × official": _of("kernels: cpu", lambda r: show_ratio(r.vs_official)),
    "step × official": _of("cpu", lambda r: show_ratio(r.vs_official)),
    "step of plain: official": _of("official", lambda r: show_ratio(r.of_plain)),
    "step of plain: mmfuse": _of("cpu", lambda r: show_ratio(r.of_plain)),
    "more MiB: official": _over_plain("official"),
    "mmfuse": _over_plain("cpu"),
}
TABLES = {
    "readme": Table(
        (
            Line("OGM", "ogm_training", "training", kernels="update_scale"),
            Line("OGM-GE", "ogm_ge_training", "training", kernels="ogm_ge"),
            Line("InfoReg", "inforeg_training", "training", kernels="inforeg"),
            Line("RedReg", "redreg_training", "training", kernels="redreg"),
            Line("MMPareto", "mmpareto_training", "training"),
        ),
        _BOTH,
    ),
    "speed": Table(
        (
            Line("OGM-GE: `grad_stats`, then `update_grads_`", "ogm_ge"),
            Line("the same in bfloat16", "ogm_ge", dtype="bfloat16"),
            Line("the whole `OGM.step` with noise", "ogm_ge_step"),
            Line("OGM: `update_grads_(scale)`", "update_scale"),
            Line("`grad_stats` with anchors", "grad_stats_anchors"),
            Line("InfoReg: Fisher trace and pull", "inforeg"),
            Line("RedReg: statistics and update", "redreg"),
            Line("`modality_scores`, batch 64, 6 classes", "modality_scores", "classes_6"),
            Line("31 classes", "modality_scores", "classes_31"),
            Line("309 classes", "modality_scores", "classes_309"),
            Line("RedReg: `noisy_views` of 64 spectrograms", "noisy_views", "spectrograms"),
            Line("`paired_cosine`, 4096 × 512", "paired_cosine", "feature_4096"),
            Line("OPM: `drop_modalities`, 4096 × 512", "drop_modalities", "feature_4096"),
            Line("ARM's information, 64 × 512", "arm_information", "fusion"),
            Line("`mutual_information`, 10⁷ pairs, 30 bins", "mutual_information", "pairs_10m"),
            Line("of 256 samples at once", "sample_information", "samples"),
            Line("`info_nce`, forward and backward, 8192 × 512", "info_nce", "contrast_8192"),
        ),
        _SPEED,
    ),
    "slow": Table(
        (
            Line("OGM on two ViT-B/16", "update_scale", "vit_b16"),
            Line("OGM on 1,000 tensors of 1,000 elements", "update_scale", "thousand"),
            Line("OGM-GE on these", "ogm_ge", "thousand"),
            Line("`scale_grad`, 64 × 512", "scale_grad", "feature"),
            Line("`drop_modalities`, 64 × 512", "drop_modalities", "feature"),
            Line("soft mutual information, 32,768 pairs", "soft_information", "pairs_32k"),
        ),
        _SPEED,
    ),
    "training": Table(_steps(), _STEPS),
    "monitor": Table(
        [
            Line(f"in {case.title.rpartition(' ')[2]} of four steps", case.name, "training")
            for case in CASES.values()
            if case.name.startswith("redreg_monitor")
        ],
        {"of training without RedReg": _of("cpu", lambda r: show_ratio(r.of_plain))},
    ),
    "overhead": Table(
        [Line(WORKLOADS[setup].title.partition(":")[0], "overhead", setup) for setup in SETUPS],
        {name: _with_method(name) for name in CASES["overhead"].steps()},
    ),
}
TABLES["adapters"] = Table(
    [Line(name.capitalize(), "adapters", f"{name}_loop") for name in LOOPS if name != "torch"],
    {"the adapter's own time": _of("OGM-GE", _own), "of a step of": _of("OGM-GE", _median)},
)
#: The measurements of all tables.
README = Plan(
    "what the documents' tables say",
    tuple(
        dict.fromkeys(u for table in TABLES.values() for line in table.lines for u in line.units)
    ),
    without=("compile", "reference"),
    samples=MAX_SAMPLES,
    plots=True,
)


def rewritten(text: str, folder: str | None = None) -> str:
    """A document with its tables anew: of another folder, or of those that it names."""
    loaded: dict[str, list[Row]] = {}

    def replace(found: re.Match[str]) -> str:
        begin, name, named, end = found.groups()
        source = folder or named
        if source not in loaded:
            loaded[source] = results.read_rows(ROOT / source / "results.csv")
        lines = TABLES[name].markdown(loaded[source])
        begin = begin.replace(named, source)
        return begin + "\n".join(["", *lines, ""]) + "\n" + end

    return _TABLE.sub(replace, text)


def sources(text: str) -> set[str]:
    """The folders that a document's tables are from."""
    return {found[3] for found in _TABLE.finditer(text)}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the tables into the documents, and draws README's picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of one commit's results")
    options = parser.parse_args(argv)
    folder = str(options.results.resolve().relative_to(ROOT))
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rewritten(path.read_text(), folder))
    picture.write(results.read_rows(ROOT / folder / "results.csv"), folder, PICTURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
