"""The documents' tables, from one commit's results: `make tables RESULTS=benchmarks/results/...`.

README.md has one table and a picture, `docs/speed.md` the other tables. This writes what stands
between `<!-- table NAME: FOLDER -->` and `<!-- end of table -->`; the measurements are those of
`python benchmarks/run.py --plan readme`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import table_cells
from cases import CASES, WORKLOADS
from cases.adapters import LOOPS
from cases.overhead import SETUPS
from engine import results
from engine.measure import MAX_SAMPLES
from engine.plan import Plan
from engine.report import NO_NUMBER
from engine.rows import Row, with_one_copy
from engine.training_case import TrainingCase

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/speed.md")
PICTURES = ROOT / "docs" / "images"
_TABLE = re.compile(r"(<!-- table (\w+): (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Unit = tuple[str, str, str]


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
    columns: Mapping[str, table_cells.Show]

    def markdown(self, rows: Sequence[Row], facts: results.Facts) -> list[str]:
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
        made = [row for _, row in shown]
        known = [i for i in range(len(self.columns)) if any(row[i] != NO_NUMBER for row in made)]
        heads = [head for i, head in enumerate(self.columns) if i in known]
        out = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
        out += [f"| {text} | " + " | ".join(row[i] for i in known) + " |" for text, row in shown]
        return out


def rows_of(rows: Sequence[Row], unit: Unit) -> table_cells.Rows:
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


@dataclass(frozen=True)
class Losses:
    """Every measurement in which mmfuse is slower than one of the others, as the results have it.

    Attributes:
        below: The ratio of medians below which it is.
    """

    below: float = 0.98
    lines: Sequence[Line] = ()

    def markdown(self, rows: Sequence[Row], facts: results.Facts) -> list[str]:
        """Head and rows, by the results' order."""
        units: dict[Unit, dict[str, Row]] = {}
        for row in rows:
            units.setdefault(results.unit_of(row), {})[row.provider] = row
        heads = list(table_cells.LOSSES)
        out = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
        for (_, workload, dtype), found in units.items():
            ratios = [table_cells.ratio(found, base) for base in table_cells.BASELINES]
            if all(ratio is None or ratio.value >= self.below for ratio in ratios):
                continue
            text = f"{found[table_cells.OURS].title}: {re.sub(r' [(].*?[)]', '', workload)}"
            text += "" if dtype == "float32" else f", {dtype}"
            shown = [text, *(show(found) for show in table_cells.LOSSES.values())]
            out.append(f"| {' | '.join(shown)} |")
        return out


class Conditions:
    """A sentence on threads and load."""

    lines: Sequence[Line] = ()

    def markdown(self, rows: Sequence[Row], facts: results.Facts) -> list[str]:
        """One paragraph."""
        cores = facts.environment["CPU"].rpartition(", ")[2]
        load = (results.largest_load(facts) or "an unknown share").replace("%", " %")
        text = f"The run had {facts.environment['threads']} threads on {cores}. "
        if facts.invocations:
            return [
                text + f"Other processes took {load} of the CPU in the busiest of its commands."
            ]
        return [
            text + f"Other processes took {load} of the CPU in the last of its commands; of the "
            "others the results do not say it."
        ]


def _setup(setup: str) -> str:
    """A setup's name in the documents; of FSDP2 only a part of what it sends is counted."""
    title = WORKLOADS[setup].title.partition(":")[0]
    return f"{title} (`all_reduce` alone)" if setup == "fsdp2" else title


def _steps() -> list[Line]:
    """Each training step that the catalogue has."""
    made = [c for c in CASES.values() if isinstance(c, TrainingCase) and not c.named_only]
    return [Line(case.title.split(":")[0], case.name, "training", optional=True) for case in made]


TABLES: dict[str, Table | Losses | Conditions] = {
    "readme": Table(
        (
            Line("OGM", "ogm_training", "training", kernels="update_scale"),
            Line("OGM-GE", "ogm_ge_training", "training", kernels="ogm_ge"),
            Line("InfoReg", "inforeg_training", "training", kernels="inforeg"),
            Line("RedReg", "redreg_training", "training", kernels="redreg"),
            Line("MMPareto", "mmpareto_training", "training"),
        ),
        table_cells.BOTH,
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
            Line("soft mutual information, 32,768 pairs", "soft_information", "pairs_32k"),
            Line("OGM on two ViT-B/16", "update_scale", "vit_b16"),
            Line("OGM on 1,000 tensors of 1,000 elements", "update_scale", "thousand"),
            Line("OGM-GE on these", "ogm_ge", "thousand"),
            Line("`scale_grad`, 64 × 512", "scale_grad", "feature"),
            Line("`drop_modalities`, 64 × 512", "drop_modalities", "feature"),
        ),
        table_cells.SPEED,
    ),
    "slow": Losses(),
    "conditions": Conditions(),
    "training": Table(_steps(), table_cells.STEPS),
    "monitor": Table(
        [
            Line(f"in {case.title.rpartition(' ')[2]} of four steps", case.name, "training")
            for case in CASES.values()
            if case.name.startswith("redreg_monitor")
        ],
        {
            "of training without RedReg": table_cells.of_plain(table_cells.OURS),
            "n": table_cells.samples("plain", table_cells.OURS),
        },
    ),
    "overhead": Table(
        [Line(_setup(setup), "overhead", setup) for setup in SETUPS],
        {
            **{name: table_cells.with_method(name) for name in CASES["overhead"].steps()},
            "n": table_cells.samples("plain", *CASES["overhead"].steps()),
        },
    ),
}
TABLES["adapters"] = Table(
    [Line(name.capitalize(), "adapters", f"{name}_loop") for name in LOOPS if name != "torch"],
    {
        "the adapter's own time": table_cells.of("OGM-GE", table_cells.own),
        "of a step of": table_cells.of("OGM-GE", table_cells.median),
        "n": table_cells.samples("OGM-GE"),
    },
)
#: The measurements of all tables.
README = Plan(
    "what the documents' tables say",
    tuple(
        dict.fromkeys(u for table in TABLES.values() for line in table.lines for u in line.units)
    ),
    without=("reference",),
    samples=MAX_SAMPLES,
    plots=True,
)


def rewritten(text: str, folder: str | None = None) -> str:
    """A document with its tables anew: of another folder, or of those that it names."""
    loaded: dict[str, tuple[list[Row], results.Facts]] = {}

    def replace(found: re.Match[str]) -> str:
        begin, name, named, end = found.groups()
        source = folder or named
        if source not in loaded:
            rows, facts = results.load(ROOT / source)
            loaded[source] = with_one_copy(rows), facts
        lines = TABLES[name].markdown(*loaded[source])
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
    # A machine with a GPU may not have what draws, and needs this module for its plan.
    import picture

    picture.write(results.read_rows(ROOT / folder / "results.csv"), folder, PICTURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
