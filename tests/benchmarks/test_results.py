"""Results go to their folder and are read again, and documents have tables of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import run
import table_cells
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
    facts = results.Facts(dict(FACTS), ["left out"], ["refused"], [{"command": "x"}])
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
    monkeypatch.setattr(environment, "built_from", lambda: environment.SAME_SOURCES)
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
    common += ["--device", "cpu", "--no-plots"]
    monkeypatch.setattr(run.providers, "provider_names", lambda device: ["foreach"])
    for case in ("update_scale", "grad_stats", "update_scale"):
        assert run.main(["--cases", case, *common]) == 0
    assert [r["case"] for r in read_csv(tmp_path)] == ["grad_stats", "update_scale"]
    _, facts = results.load(tmp_path)
    assert len(facts.invocations) == 3 and "command" not in facts.environment
    assert all({"command", "date"} <= set(of_run) for of_run in facts.invocations)


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
    assert f"Other processes took {results.largest_load(facts)}".replace("%", " %") in texts[1]
    assert not facts.refused
    assert {found[2] for text in texts for found in tables._TABLE.finditer(text)} == {
        *tables.TABLES
    }
    picture = pytest.importorskip("picture")
    png = (tables.PICTURES / picture.NAME).read_bytes()
    assert f"Source\0{source}".encode() in png


def test_the_picture_shows_what_was_measured() -> None:
    picture = pytest.importorskip("picture")
    title = tables.WORKLOADS["training"].title
    made = [
        row(case, name, ms, title)
        for case in picture.SHOWN.values()
        for name, ms in (("plain", 2.0), ("official", 5.0), ("cpu", 2.5))
    ]
    # Neither another workload nor another dtype is in it.
    others = [dataclasses.replace(r, workload="w", median_ms=99.0) for r in made]
    others += [dataclasses.replace(r, dtype="float64", median_ms=99.0) for r in made]
    assert set(picture.times([*made, *others]).values()) == {(2.5, 1.25)}
    (axis,) = picture.draw(made).axes
    assert sorted({round(bar.get_width(), 2) for bar in axis.patches}) == [1.25, 2.5]
    with pytest.raises(LookupError, match="no ogm_training of a plain step"):
        picture.times([*others, *made[1:]])


def test_a_table_that_was_edited_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    title = tables.WORKLOADS["resnet18"].title
    times = {"official": 17.5, "foreach": 16.0, "compile": 2.1, "cpu": 2.0}
    rows = [row("ogm_ge", name, ms, title) for name, ms in times.items()]
    monkeypatch.setattr(results, "load", lambda path: (rows, results.Facts()))
    table = tables.Table([tables.Line("OGM-GE", "ogm_ge")], table_cells.SPEED)
    monkeypatch.setattr(tables, "TABLES", {"speed": table})
    text = "a\n<!-- table speed: old -->\nnumbers\n<!-- end of table -->\nb\n"
    found = tables.rewritten(text, "benchmarks/results/x/y")
    assert "numbers" not in found
    assert "| OGM-GE | 8.75× (8.75–8.75) | 8.00× (8.00–8.00) | 1.05× (1.05–1.05) | 3 |" in found
    assert found.startswith("a\n<!-- table speed: benchmarks/results/x/y -->\n")
    assert tables.rewritten(found) == found
    monkeypatch.setattr(results, "load", lambda path: ([], results.Facts()))
    with pytest.raises(LookupError, match="no ogm_ge on resnet18"):
        tables.rewritten(found)


def test_what_the_tables_need_is_what_the_plan_measures() -> None:
    units = {u for table in tables.TABLES.values() for line in table.lines for u in line.units}
    assert set(run.PLANS["readme"].units) == units
    trainings = {c.method for c in tables.CASES.values() if isinstance(c, tables.TrainingCase)}
    assert {line.case for line in tables.TABLES["training"].lines} >= {
        f"{name.lower()}_training" for name in trainings
    }


def test_every_measurement_that_is_lost_is_in_the_table() -> None:
    def unit(case: str, dtype: str = "float32", **ms: float) -> list[Row]:
        made = [row(case, name, time, "w (some)") for name, time in ms.items()]
        return [dataclasses.replace(r, dtype=dtype) for r in made]

    rows = [
        *unit("won", official=2.0, foreach=1.5, compile=1.0, cpu=1.0),
        *unit("near", official=0.99, cpu=1.0),
        *unit("to official", official=0.5, foreach=2.0, cpu=1.0),
        *unit("to foreach", "bfloat16", foreach=0.9, cpu=1.0),
        *unit("to compile", official=2.0, compile=0.97, cpu=1.0),
        *unit("without mmfuse", plain=1.0, OGM=2.0),
    ]
    lines = tables.Losses().markdown(rows, results.Facts())
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| to official: w",
        "| to foreach: w, bfloat16",
        "| to compile: w",
    ]
    assert "| 0.50× (0.50–0.50) | 2.00× (2.00–2.00) | — | 3 |" in lines[2]


def test_what_the_spread_contains_is_about_one() -> None:
    base = dataclasses.replace(row("a", "official", 1.1), p20_ms=1.0, p80_ms=1.2)
    ours = dataclasses.replace(row("a", "cpu", 1.0), p20_ms=0.9, p80_ms=1.05, samples=40)
    rows = {"official": base, "cpu": ours}
    assert table_cells.times("official")(rows) == "about 1 (0.95–1.33)"
    assert table_cells.samples("official", "cpu", "foreach")(rows) == "3–40"
    rows["cpu"] = dataclasses.replace(ours, p80_ms=0.98)
    assert table_cells.times("official")(rows) == "1.10× (1.02–1.33)"
    assert table_cells.times("foreach")(rows) == "—"
    steps = {"plain": base, "OGM": dataclasses.replace(base, reduced=3)}
    assert table_cells.with_method("OGM")(steps) == "about 1 (3)"
    steps["OGM"] = dataclasses.replace(base, median_ms=2.2, p20_ms=2.0, reduced=0)
    assert table_cells.with_method("OGM")(steps) == "2.00×"


def test_memory_below_zero_keeps_its_sign() -> None:
    shown = [table_cells.mib(row("a", "cpu", 1.0), less) for less in (0.0, 0.8, 0.51, 12.5, 0.5)]
    assert shown == ["0.5", "-0.3", "0", "-12", "0"]
