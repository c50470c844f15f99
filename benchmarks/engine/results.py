"""The folders of results, results/<machine>/<commit>/, and reading them again.

A folder of a commit is filled by one run or by several, each of which replaces what it measures
anew; `facts.json` has what the numbers depend on, the same for all of them, and a line for each
run. Nothing of a dirty tree gets there, nor of a library that was built from other sources.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from . import environment, report
from .rows import Row, with_one_copy

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: These differ from one run to the next of a folder; of the other facts none may.
OF_A_RUN = ("command", "date", environment.LOAD)


class DirtyTree(SystemExit):
    """One sentence, and exit code 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)


@dataclass
class Facts:
    """All that numbers depend on, and what is not among them.

    Attributes:
        environment: Facts that all runs have in common; in folders from before `invocations`, with
            the last run's command, date and load.
        skipped: Measurements that were not made, and why.
        refused: Providers that the gate has refused.
        invocations: Of each run the facts of `OF_A_RUN`.
    """

    environment: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    invocations: list[dict[str, str]] = field(default_factory=list)


def folder_of_commit(device: torch.device) -> Path:
    """The folder that a run's results belong to.

    Raises:
        DirtyTree: files differ from the commit, there is none, or the library is not built from its
            sources.
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
    built = environment.built_from()
    if built not in (None, environment.SAME_SOURCES):
        raise DirtyTree(
            f"results belong to a commit, and the compiled library is of {built}: build it "
            "(make build), or name a folder with --output"
        )
    machine = environment.folder_name(environment.machine_model(device))
    return RESULTS / machine / commit


def check_same(folder: Path, old: Facts, now: Mapping[str, str]) -> None:
    """Holds a run against those whose results the folder has.

    Raises:
        DirtyTree: they are not of one commit, machine, library and number of threads.
    """
    if not old.environment:
        return
    for key in dict.fromkeys([*old.environment, *now]):
        was, is_now = (facts.get(key, "not known") for facts in (old.environment, now))
        if key not in OF_A_RUN and was != is_now:
            raise DirtyTree(
                f"the results in {folder} have {key}: {was}, and this run has {is_now}: name "
                "another folder with --output, or remove that one"
            )


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.csv; a column that it does not have yet is empty."""
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
            Row(**{f.name: parse(f.name, row.get(f.name, "")) for f in fields(Row)})
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


def merged_lines(old: Sequence[str], new: Sequence[str], again: Collection[str]) -> list[str]:
    """Old lines that are about none of what was measured again, then the new ones.

    Args:
        old: Lines of the runs before.
        new: Those of this run.
        again: Measurements as `Unit` shows itself, and workloads; a line begins with one of them.
    """
    kept = [
        line
        for line in old
        if not any(line.startswith((f"{name}:", f"{name} fails:")) for name in again)
    ]
    return list(dict.fromkeys([*kept, *new]))


def unit_of(row: Row) -> tuple[str, str, str]:
    """The measurement that a row belongs to, as `Unit.labels` says it."""
    return row.case, row.workload, row.dtype


def write(folder: Path, rows: Sequence[Row], facts: Facts, *, plots: bool = False) -> None:
    """CSV, facts, Markdown and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = with_one_copy(rows)
    report.write_csv(rows, folder / "results.csv")
    (folder / "facts.json").write_text(
        json.dumps({f.name: getattr(facts, f.name) for f in fields(Facts)}, indent=1) + "\n"
    )
    names: list[str] = []
    if plots:
        # A second of imports, of a package that a machine with a GPU may not have.
        from . import plot

        names = plot.write_plots(rows, folder, _subtitle(facts.environment))
    lists = facts.skipped, facts.refused, names, facts.invocations
    text = report.markdown(rows, facts.environment, *lists)
    (folder / "results.md").write_text(text)


def largest_load(facts: Facts) -> str | None:
    """The largest share of the CPU that others took in any of the runs; None where none says."""
    runs = facts.invocations or [facts.environment]
    loads = [run[environment.LOAD] for run in runs if environment.LOAD in run]
    return max(loads, key=lambda load: int(load.rstrip("%"))) if loads else None


def _subtitle(facts: Mapping[str, str]) -> str:
    return f"{facts['device']}; {facts['threads']} threads; {facts['mmfuse']}"
