"""The folders of results, results/<machine>/<commit>/, and reading them again.

A folder of a commit is filled by one run or by several, each of which replaces what it measures
anew; `facts.json` has what the numbers depend on. Nothing of a dirty tree gets there.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from . import environment, report
from .rows import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"


class DirtyTree(SystemExit):
    """One sentence, and exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)


@dataclass
class Facts:
    """All that numbers depend on, and what is not among them."""

    environment: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def folder_of_commit(device: torch.device) -> Path:
    """The folder that a run's results belong to.

    Raises:
        DirtyTree: files differ from the commit, or there is none.
    """
    commit = environment.commit()
    if commit is None:
        raise DirtyTree("this is no git checkout: name a folder with --output")
    changed = environment.changed_files()
    if changed:
        raise DirtyTree(
            f"results belong to a commit, and {changed[0]} differs from it: commit, or name a "
            "folder with --output"
        )
    machine = environment.folder_name(environment.machine_model(device))
    return RESULTS / machine / commit


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.csv that this version has written."""
    kinds = get_type_hints(Row)

    def parse(name: str, text: str) -> Any:
        kind = kinds[name]
        if kind is str:
            return text
        if text == "":
            return None
        return int(text) if kind in (int, int | None) else float(text)

    with path.open(newline="") as file:
        return [
            Row(**{f.name: parse(f.name, row[f.name]) for f in fields(Row)})
            for row in csv.DictReader(file)
        ]


def load(folder: Path) -> tuple[list[Row], Facts]:
    """Rows and facts of a folder; none where there is none."""
    if not (folder / "facts.json").is_file():
        return [], Facts()
    facts = Facts(**json.loads((folder / "facts.json").read_text()))
    return read_rows(folder / "results.csv"), facts


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows of what has not been measured again, then the new ones."""
    again = {unit_of(row) for row in new}
    return [*(row for row in old if unit_of(row) not in again), *new]


def unit_of(row: Row) -> tuple[str, str, str]:
    """The measurement that a row belongs to, as `Unit.labels` says it."""
    return row.case, row.workload, row.dtype


def write(folder: Path, rows: Sequence[Row], facts: Facts, *, plots: bool = False) -> None:
    """CSV, facts, Markdown and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(rows, folder / "results.csv")
    (folder / "facts.json").write_text(
        json.dumps({f.name: getattr(facts, f.name) for f in fields(Facts)}, indent=1) + "\n"
    )
    names: list[str] = []
    if plots:
        # A second of imports, of a package that a machine with a GPU may not have.
        from . import plot

        names = plot.write_plots(rows, folder, _subtitle(facts.environment))
    text = report.markdown(rows, facts.environment, facts.skipped, facts.refused, names)
    (folder / "results.md").write_text(text)


def _subtitle(facts: Mapping[str, str]) -> str:
    return f"{facts['device']}; {facts['threads']} threads; {facts['mmfuse']}"
