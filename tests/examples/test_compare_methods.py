"""The comparison from its first trial to its figures, on a stand-in, with stops in between."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demonstrated import TASK, VIEWS

pytest.importorskip("matplotlib")
pytest.importorskip("optuna")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

import compare_methods as compare
from demonstrations import figures, summary, wrist_data
from demonstrations.baselines import Plan
from demonstrations.data import DataError
from demonstrations.settings import fingerprint, load
from demonstrations.tasks import TASKS
from demonstrations.ways import ONLY, OWN_LOSSES, RATE, at_rates, ways

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
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(compare, "PAGE", tmp_path / "page.md")

    def call(
        *arguments: str, seeds: int = 2, folder: str = "results", methods: Sequence[str] = WAYS
    ) -> int:
        few = ["--trials", "1", "--seeds", str(seeds), "--methods", *methods]
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
    every = [*WAYS, *at_rates(WAYS, found)]
    assert keys == {(w, s, e) for w in every for s in "01" for e in ("last", "selected")}
    assert len(table) == len(keys)
    with (folder / "differences.csv").open(newline="") as file:
        compared = list(csv.DictReader(file))
    against = {row["method"]: row["baseline"] for row in compared if RATE not in row["baseline"]}
    others = [way for way in WAYS if way != "joint"]
    assert against == {way: OWN_LOSSES if way == "MLB" else "joint" for way in others}
    for name in ("forest", "noise", "probes"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed, said = capsys.readouterr()
    assert "forest.png" in printed and "MLB" in printed
    assert "2 seeds are too few for 4 comparisons" in said
    assert not (tmp_path / "published").exists(), "nothing is published unasked"


@pytest.mark.slow
def test_other_settings_are_trained_again_and_never_reported_before(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--stages", "search", "train") == 0
    path = tmp_path / "results" / "wrist" / "settings.json"
    content = json.loads(path.read_text())
    content["settings"]["OGM"] = {"lr": 0.07, "alpha": 0.5}
    path.write_text(json.dumps(content))
    before = rows(tmp_path)
    assert run("--stages", "report") == 1
    assert "runs of 'OGM' with other settings" in capsys.readouterr().err
    assert rows(tmp_path) == before
    assert run("--stages", "train") == 0
    assert "of other settings, taken out: OGM" in capsys.readouterr().err
    after = rows(tmp_path)
    assert [row for row in before if row["method"] != "OGM"] == [
        row for row in after if row["method"] not in ("OGM", "joint, learning rate 0.07")
    ]
    old, new = (
        {row["settings"] for row in table if row["method"] == "OGM"} for table in (before, after)
    )
    assert len(old) == len(new) == 1 and old != new
    assert sum(row["method"] == "joint, learning rate 0.07" for row in after) == 4
    assert run("--stages", "report") == 0


@pytest.mark.slow
def test_a_search_of_some_and_one_that_is_stopped_keep_the_settings_of_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--stages", "search") == 0
    folder = tmp_path / "results" / "wrist"
    names = ("settings.json", "trials.csv")
    before = [(folder / name).read_text() for name in names]
    (folder / "search.journal").unlink()
    assert run("--stages", "search", methods=["OGM"]) == 0
    assert [(folder / name).read_text() for name in names] == before, "a search repeats itself"

    def stop(self: compare.Comparison) -> None:
        raise compare.OutOfTimeError("over")

    (folder / "search.journal").unlink()
    monkeypatch.setattr(compare.Comparison, "in_time", stop)
    assert run("--stages", "search") == 1
    assert [(folder / name).read_text() for name in names] == before
    capsys.readouterr()
    assert run("--stages", "search", "--trials", "2") == 1
    assert "the best of 1 trials, not of 2" in capsys.readouterr().err
    assert [(folder / name).read_text() for name in names] == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["OGM", "ensemble"])
def test_a_method_alone_gets_what_it_is_compared_with(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert run(methods=[method]) == 0
    assert "also trained, to compare with: only strong, only weak, joint" in capsys.readouterr().err
    assert {row["method"] for row in rows(tmp_path)} >= {"only weak", "joint", method}


def test_figures_are_of_seeds_that_all_ways_have() -> None:
    of = {"joint": "012", "OGM": "12", "OPM": "1"}
    table = [{"method": m, "seed": s} for m, seeds in of.items() for s in seeds]
    assert {row["seed"] for row in figures.complete(table)} == {"1"}


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
    (found,) = summary.compare(table, VIEWS, {})
    assert (found.method, found.baseline, found.seeds) == ("OGM", "joint", 3)
    assert found.difference == pytest.approx(0.1) and found.low == pytest.approx(0.1)
    assert found.mean == pytest.approx(0.3)


def test_a_method_is_compared_at_its_own_learning_rate_too() -> None:
    """Joint training gains as much from the rate of OGM as OGM does, so that nothing is left."""
    empty = dict.fromkeys(summary.measures(VIEWS), "")
    gains = {
        "joint": 0.0,
        "only weak": 0.2,
        "OGM": 0.1,
        "OPM": 0.1,
        "joint, learning rate 0.02": 0.1,
    }
    table = [
        empty
        | {"method": m, "seed": str(s), "epoch": "last", "accuracy": f"{more + s / 10**3:.4f}"}
        for m, more in gains.items()
        for s in range(6)
    ]
    tuned = {way: {"lr": 0.1} for way in gains} | {"OGM": {"lr": 0.02}}
    found = {(row.method, row.baseline): row for row in summary.compare(table, VIEWS, tuned)}
    assert found.keys() == {
        ("only weak", "joint"),
        ("OGM", "joint"),
        ("OGM", "joint, learning rate 0.02"),
        ("OPM", "joint"),
    }
    assert found["OGM", "joint, learning rate 0.02"].difference == 0
    # Six seeds of one sign: 2^-5, times the two claims; a modality alone is none.
    assert found["OGM", "joint"].p_holm == 2 * 2.0**-5
    assert found["only weak", "joint"].p_holm is None
    assert summary.names(table) == ["only weak", "joint", "OGM", "OPM"]
    said = "6 seeds are too few for 2 comparisons: their smallest p-value is 0.062 after"
    assert summary.too_few(list(found.values()))[0].startswith(said)


def test_enough_seeds_are_not_warned_about() -> None:
    row = summary.Compared("OGM", "joint", "last", "accuracy", 15, 0.5, 0.1, 0.0, 0.2, 0.01)
    assert summary.too_few([row] * 25) == []
    assert summary.too_few([replace(row, seeds=9)] * 25) != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--publish",), "argument --publish: goes with all methods"),
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


def test_the_page_says_how_often_people_are_tested_who_tuned_the_settings() -> None:
    every = torch.arange(10)
    tuned = set()
    for seed in range(compare.SEARCH_SEED, compare.SEARCH_SEED + TASKS["wrist"].search_seeds):
        tuned |= set(wrist_data.roles(every, seed)[1].tolist())
    hits = [len(tuned & set(wrist_data.roles(every, s)[0].tolist())) for s in range(compare.SEEDS)]
    said = (
        f"{len(tuned)} of the ten people, who are tested in {sum(h > 0 for h in hits)} of the "
        f"{compare.SEEDS} seeds, {sum(hits)} of {2 * compare.SEEDS} times"
    )
    assert said in " ".join(compare.PAGE.read_text().split())


def test_what_is_made_is_not_what_is_published() -> None:
    args = compare.parse(["wrist"])
    assert args.results == compare.RESULTS and not args.publish
    assert compare.PUBLISHED not in (args.results, *args.results.parents)


PUBLISHED = sorted(path.parent for path in compare.PUBLISHED.glob("*/settings.json"))
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
    tuned |= at_rates(list(tuned), tuned)
    seeds = [str(seed) for seed in range(compare.SEEDS)]
    task = TASKS[folder.name]
    prints = {way: fingerprint(drawn, task.epochs, Plan.batch_size) for way, drawn in tuned.items()}
    found = sorted((row["method"], row["seed"], row["epoch"], row["settings"]) for row in runs)
    assert found == sorted(
        (way, seed, epoch, mark)
        for way, mark in prints.items()
        for seed in seeds
        for epoch in summary.EPOCHS
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_differences_are_those_of_the_published_runs(
    folder: Path, tmp_path: Path
) -> None:
    views = TASKS[folder.name].views
    runs = summary.read(folder / "runs.csv")
    _, tuned = load(folder / "settings.json")
    table = summary.compare(runs, views, tuned)
    assert not summary.too_few(table)
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
