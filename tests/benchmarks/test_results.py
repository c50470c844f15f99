"""Results go to their folder and are read again, and documents have tables of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import picture
import pytest
import run
import tables
import torch
from benchmarked import read_csv
from engine import environment, results
from engine.rows import Row

CPU = torch.device("cpu")


def row(case: str, provider: str, ms: float, workload: str = "w") -> Row:
    labels = {"case": case, "title": case, "workload": workload, "dtype": "float32"}
    numbers = {"device": "cpu", "provider": provider, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    counts = {"samples": 3, "floor_bytes": 8, "launches": 1, "host_syncs": 0, "extra_mib": 0.5}
    rest = dict.fromkeys(Row.__dataclass_fields__)
    return Row(**{**rest, **labels, **numbers, **counts})


FACTS = {"device": "cpu: x", "threads": "2", "mmfuse": "0.1.0, commit abc", "command": "first"}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [row("a", "official", 1.5), dataclasses.replace(row("a", "cpu", 1.0), reduced=3)]
    facts = results.Facts(dict(FACTS), ["left out"], ["refused"])
    results.write(tmp_path, rows, facts)
    assert results.load(tmp_path) == (rows, facts)
    assert results.load(tmp_path / "nowhere") == ([], results.Facts())


def test_a_second_run_replaces_what_it_measures_anew() -> None:
    old = [row("a", "official", 1.0), row("a", "cpu", 1.0), row("b", "cpu", 1.0)]
    new = [row("a", "cpu", 2.0)]
    assert results.merged(old, new) == [old[2], *new]


def test_results_belong_to_machine_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "machine_model", lambda device: "A CPU")
    monkeypatch.setattr(environment, "commit", lambda: "0123456789")
    monkeypatch.setattr(environment, "changed_files", list)
    assert results.folder_of_commit(CPU) == results.RESULTS / "a-cpu" / "0123456789"


@pytest.mark.parametrize(
    ("commit", "changed", "message"),
    [("0123456789", ["mmfuse/x.py"], "mmfuse/x.py differs"), (None, [], "no git checkout")],
)
@pytest.mark.usefixtures("small_machine")
def test_a_dirty_tree_has_no_folder_and_nothing_is_measured(
    commit: str | None,
    changed: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(environment, "commit", lambda: commit)
    monkeypatch.setattr(environment, "changed_files", lambda: changed)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run.Session, "measure", lambda self, *a: measured.append(a))
    arguments = ["--cases", "update_scale", "--workloads", "tiny", "--device", "cpu", "--no-plots"]
    with pytest.raises(SystemExit, match=message):
        run.main(arguments)
    assert not measured and not (tmp_path / "results").exists()
    # Elsewhere a trial is allowed.
    assert run.main([*arguments, "--output", str(tmp_path / "trial")]) == 0
    assert len(measured) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("small_machine")
def test_a_run_adds_to_what_its_commit_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "folder_of_commit", lambda device: tmp_path)
    common = ["--workloads", "tiny", "--dtype", "float32", "--seconds", "0.01", "--no-busy"]
    common += ["--providers", "foreach", "--device", "cpu", "--no-plots"]
    for case in ("update_scale", "grad_stats", "update_scale"):
        assert run.main(["--cases", case, *common]) == 0
    assert [r["case"] for r in read_csv(tmp_path)] == ["grad_stats", "update_scale"]


def test_changed_files_are_named_but_not_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    assert len(environment.commit() or "") == 10
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "results.csv").write_text("")
    assert environment.changed_files() == []
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "new.py").write_text("")
    assert environment.changed_files() == ["a.py", "new.py"]


# The documents' tables


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_tables_are_what_the_committed_results_give(document: str) -> None:
    text = (tables.ROOT / document).read_text()
    assert tables.rewritten(text) == text


def test_all_tables_and_readmes_picture_come_from_one_commit() -> None:
    texts = [(tables.ROOT / document).read_text() for document in tables.DOCUMENTS]
    (source,) = set().union(*map(tables.sources, texts))
    folder = tables.ROOT / source
    assert folder.parent.parent == results.RESULTS
    _, facts = results.load(folder)
    assert facts.environment["mmfuse"].endswith(f"commit {folder.name}")
    assert not facts.refused
    assert {found[2] for text in texts for found in tables._TABLE.finditer(text)} == {
        *tables.TABLES
    }
    png = (tables.PICTURES / picture.NAME).read_bytes()
    assert f"Source\0{source}".encode() in png


def test_the_picture_shows_what_was_measured() -> None:
    labels = {"dtype": "float32"}
    made = [
        dataclasses.replace(row(case, name, 1.0), of_plain=of_plain, **labels)
        for case in picture.SHOWN.values()
        for name, of_plain in (("official", 2.5), ("cpu", 1.25))
    ]
    assert set(picture.times(made).values()) == {(2.5, 1.25)}
    (axis,) = picture.draw(made).axes
    assert sorted({round(bar.get_width(), 2) for bar in axis.patches}) == [1.25, 2.5]
    with pytest.raises(LookupError, match="no ogm_training of both"):
        picture.times(made[1:])


def test_a_table_that_was_edited_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    title = tables.WORKLOADS["resnet18"].title
    rows = [
        dataclasses.replace(row("ogm_ge", name, 1.0, title), vs_official=ratio)
        for name, ratio in (("official", 1.0), ("foreach", 1.1), ("cpu", 8.75))
    ]
    monkeypatch.setattr(results, "read_rows", lambda path: rows)
    table = tables.Table([tables.Line("OGM-GE", "ogm_ge")], tables._SPEED)
    monkeypatch.setattr(tables, "TABLES", {"speed": table})
    text = "a\n<!-- table speed: old -->\nnumbers\n<!-- end of table -->\nb\n"
    found = tables.rewritten(text, "benchmarks/results/x/y")
    assert "numbers" not in found and "| OGM-GE | 8.75× |" in found
    assert found.startswith("a\n<!-- table speed: benchmarks/results/x/y -->\n")
    assert tables.rewritten(found) == found
    monkeypatch.setattr(results, "read_rows", lambda path: [])
    with pytest.raises(LookupError, match="no ogm_ge on resnet18"):
        tables.rewritten(found)


def test_what_the_tables_need_is_what_the_plan_measures() -> None:
    units = {u for table in tables.TABLES.values() for line in table.lines for u in line.units}
    assert set(run.PLANS["readme"].units) == units
    trainings = {c.method for c in tables.CASES.values() if isinstance(c, tables.TrainingCase)}
    assert {line.case for line in tables.TABLES["training"].lines} >= {
        f"{name.lower()}_training" for name in trainings
    }
