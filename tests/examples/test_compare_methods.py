"""The comparison from its first trial to its figures, on a stand-in, with stops in between."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from demonstrated import TASK, VIEWS

pytest.importorskip("matplotlib")
pytest.importorskip("optuna")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

import compare_methods as compare
from demonstrations import summary
from demonstrations.data import DataError
from demonstrations.settings import load
from demonstrations.tasks import TASKS
from demonstrations.ways import ONLY, OWN_LOSSES, ways

# Without the compiled library the examples run on the reference, and say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
WAYS = [*(f"{ONLY}{view}" for view in VIEWS), "ensemble", "joint", OWN_LOSSES, "OGM", "MLB"]

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the script with the stand-in as its data set; returns the exit status."""
    monkeypatch.setitem(compare.TASKS, "wrist", TASK)
    monkeypatch.setattr(compare, "HERE", tmp_path)

    def call(*arguments: str, seeds: int = 2, folder: str = "results") -> int:
        few = ["--trials", "1", "--seeds", str(seeds), "--methods", *WAYS]
        return compare.main(["wrist", *few, "--results", str(tmp_path / folder), *arguments])

    return call


def rows(tmp_path: Path, folder: str = "results") -> list[dict[str, str]]:
    return summary.read(tmp_path / folder / "wrist" / "runs.csv")


@pytest.mark.slow
def test_it_searches_trains_and_reports(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    folder = tmp_path / "results" / "wrist"
    command, found = load(folder / "settings.json")
    assert command == "python examples/compare_methods.py wrist --stages search --trials 1"
    assert found.keys() == set(WAYS)
    with (folder / "trials.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [
            way for way in WAYS if way != "ensemble"
        ]
    table = rows(tmp_path)
    keys = {(row["method"], row["seed"], row["epoch"]) for row in table}
    assert keys == {(w, s, e) for w in WAYS for s in "01" for e in ("last", "selected")}
    assert len(table) == len(keys)
    with (folder / "differences.csv").open(newline="") as file:
        compared = list(csv.DictReader(file))
    against = {row["method"]: row["baseline"] for row in compared}
    others = [way for way in WAYS if way != "joint"]
    assert against == {way: OWN_LOSSES if way == "MLB" else "joint" for way in others}
    for name in ("forest", "noise", "probes"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "forest.png" in printed and "MLB" in printed


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_gives_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--stages", "search", "train", folder="whole") == 0
    calls = 0

    def impatient(self: compare.Comparison) -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise compare.OutOfTimeError("over; run it again to go on")

    monkeypatch.setattr(compare.Comparison, "in_time", impatient)
    for _ in range(20):
        if run("--stages", "search", "train", folder="parts") == 0:
            break
        assert "run it again" in capsys.readouterr().err
    assert calls > 10
    assert rows(tmp_path, "parts") == rows(tmp_path, "whole")


@pytest.mark.slow
def test_more_seeds_add_rows_and_change_none(run: Run, tmp_path: Path) -> None:
    assert run("--stages", "search", "train", seeds=1) == 0
    before = rows(tmp_path)
    assert run("--stages", "train", seeds=2) == 0
    after = rows(tmp_path)
    assert after[: len(before)] == before and len(after) == 2 * len(before)


def test_stages_that_come_too_early_say_what_is_missing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--stages", "train") == 1
    assert "run the stage search first" in capsys.readouterr().err
    assert run("--stages", "report") == 1
    assert "run the stage train first" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["a,b\n1,2\n", "method,seed,epoch,accuracy\njoint,0\n"])
def test_a_table_of_runs_that_is_damaged_is_said(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(line)
    with pytest.raises(DataError, match=r"line 2 of .*runs.csv is no run of a comparison"):
        summary.read(path)


def test_differences_are_paired_by_seed() -> None:
    """A method that is 0.1 better in every seed is, however the seeds differ."""
    empty = dict.fromkeys(summary.measures(VIEWS), "")
    table = [
        empty | {"method": m, "seed": str(s), "epoch": "last", "accuracy": f"{0.2 * s + more:.4f}"}
        for m, more in (("joint", 0.0), ("OGM", 0.1))
        for s in (0, 1, 2)
    ]
    # A seed that only one of both has counts for nothing.
    table.append(table[-1] | {"seed": "7", "accuracy": "0.0"})
    (found,) = summary.compare(table, VIEWS)
    assert (found.method, found.baseline, found.seeds) == ("OGM", "joint", 3)
    assert found.difference == pytest.approx(0.1) and found.low == pytest.approx(0.1)
    assert found.mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", "0"), "argument --trials: must be from 1"),
        (("--seeds", "5000"), "argument --seeds: must be from 1 to 1000"),
        (("--methods", "magic"), "'magic' is none of: only strong, only weak, ensemble, joint"),
    ],
)
def test_a_wrong_argument_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


PUBLISHED = sorted(path.parent for path in compare.RESULTS.glob("*/settings.json"))
assert [folder.name for folder in PUBLISHED] == ["animals", "wrist"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_page_shows_the_published_table(folder: Path) -> None:
    table = (folder / "table.md").read_text()
    place = f"<!-- comparison {folder.name}: make compare TASK={folder.name} -->\n\n{table}"
    assert place in compare.PAGE.read_text()
    runs = summary.read(folder / "runs.csv")
    _, tuned = load(folder / "settings.json")
    known = ways(TASKS[folder.name].views)
    assert set(summary.names(runs)) == set(known) == set(tuned)
    assert len(runs) == len(known) * 10 * 2, "ten seeds, at two epochs each"


@pytest.mark.slow
@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_differences_are_those_of_the_published_runs(
    folder: Path, tmp_path: Path
) -> None:
    views = TASKS[folder.name].views
    runs = summary.read(folder / "runs.csv")
    table = summary.compare(runs, views)
    summary.write(tmp_path / "differences.csv", table)
    again = (tmp_path / "differences.csv").read_text()
    assert again == (folder / "differences.csv").read_text()
    lines = summary.cells(table, runs, views)
    assert summary.markdown(lines) == (folder / "table.md").read_text()


def test_a_page_without_a_place_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- comparison wrist: command -->\nold\n<!-- end of comparison -->\n")
    summary.publish(page, "comparison wrist", "new\n")
    assert page.read_text() == (
        "<!-- comparison wrist: command -->\n\nnew\n\n<!-- end of comparison -->\n"
    )
    with pytest.raises(DataError, match="one place for the 'comparison animals', it has 0"):
        summary.publish(page, "comparison animals", "new")
