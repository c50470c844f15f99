"""The search: every way to train takes what is drawn for it, and a stop changes nothing."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
from demonstrated import CLASSES, TASK, VIEWS

import mmfuse

pytest.importorskip("optuna")

import optuna
from demonstrations import search, settings
from demonstrations.baselines import Plan
from demonstrations.data import DataError
from demonstrations.training import Run
from demonstrations.ways import ENSEMBLE, JOINT, ways

pytestmark = [
    pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


def started(folder: Path, epochs: int = 1) -> search.Search:
    plan = Plan(epochs=epochs, batch_size=32)
    return search.Search(
        folder / "journal", "stand-in", VIEWS, {100: TASK.split(None, 100)}, plan, len(CLASSES)
    )


def test_what_is_drawn_are_arguments_of_the_method() -> None:
    assert search.SPACES.keys() <= mmfuse.METHODS.keys()
    for name, values in search.SPACES.items():
        assert values.keys() <= signature(mmfuse.METHODS[name]).parameters.keys(), name


@pytest.mark.parametrize("way", ways(VIEWS))
def test_every_way_to_train_takes_what_is_drawn(way: str) -> None:
    """Both ends of every range are tried."""
    for end in ("low", "high"):
        drawn = {name: getattr(value, end) for name, value in search.space(way, VIEWS).items()}
        drawn["lr"] = 0.01
        plan = search.planned(Plan(epochs=1, batch_size=32), drawn, 0)
        run = Run(ways(VIEWS)[way], TASK.split(None, 0), plan, len(CLASSES))
        assert run.plan.lr == 0.01
        assert run.train().accuracy.shape == (1,)


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    way = "LearningRates"
    build = ways(VIEWS)[way]
    whole, first = started(tmp_path / "whole"), started(tmp_path / "parts")
    for _ in range(3):
        whole.trial(way, build)
    first.trial(way, build)
    # A trial that was drawn, but not told, is what a stop leaves.
    study = first.study(way)
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    study.ask(search.space(way, VIEWS))
    second = started(tmp_path / "parts")
    for _ in range(2):
        second.trial(way, build)
    one, other = ([(t.params, t.value) for t in found.finished(way)] for found in (whole, second))
    assert one == other and len(one) == 3
    assert {name for name, _ in one[0][0].items()} == {"lr", "rates.strong", "rates.weak"}


def test_all_ways_to_train_try_the_same_learning_rates(tmp_path: Path) -> None:
    found = started(tmp_path)
    for way in (JOINT, "OGM-GE"):
        for _ in range(2):
            found.trial(way, ways(VIEWS)[way])
    rates = [[t.params["lr"] for t in found.finished(way)] for way in (JOINT, "OGM-GE")]
    assert rates[0] == rates[1] and rates[0][0] != rates[0][1]


def test_the_best_of_as_many_trials_and_the_ensemble_of_its_members(tmp_path: Path) -> None:
    found = started(tmp_path, epochs=2)
    every = [*(way for way in ways(VIEWS) if way.startswith("only ")), JOINT, ENSEMBLE]
    for way in every[:2]:
        for _ in range(2):
            found.trial(way, ways(VIEWS)[way])
    found.trial(JOINT, ways(VIEWS)[JOINT])
    chosen = search.best(found, every, trials=2)
    assert chosen.keys() == {*every[:2], ENSEMBLE}  # joint training has one trial only
    for way in every[:2]:
        trials = found.finished(way)
        most = max(t.value for t in trials)
        assert chosen[way] in [t.params for t in trials if t.value == most]
    rates = {f"rates.{way[5:]}": chosen[way]["lr"] for way in every[:2]}
    assert chosen[ENSEMBLE] == {"lr": max(rates.values()), **rates}


def test_trials_of_another_search_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ways(VIEWS)["OGM"]
    started(tmp_path).trial("OGM", build)
    assert len(started(tmp_path).finished("OGM")) == 1
    assert started(tmp_path, epochs=2).finished("OGM") == []
    monkeypatch.setattr(mmfuse, "__version__", "another")
    assert started(tmp_path).finished("OGM") == []
    monkeypatch.undo()
    monkeypatch.setitem(search.SPACES, "OGM", {"alpha": search.FloatDistribution(0.1, 0.9)})
    assert started(tmp_path).finished("OGM") == []


def test_trials_of_other_ways_stay_in_the_table(tmp_path: Path) -> None:
    found, path = started(tmp_path), tmp_path / "trials.csv"
    for way in (JOINT, "OGM"):
        found.trial(way, ways(VIEWS)[way])
        search.save_trials(path, found, [way], 1)
    lines = path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["method", JOINT, "OGM"]
    search.save_trials(path, found, [JOINT], 1)
    assert path.read_text().splitlines() == lines


def test_settings_of_other_ways_stay_and_other_trials_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings.save(path, "one", 2, {"a": {"lr": 0.1}, "b": {"lr": 0.2}})
    settings.save(path, "two", 2, {"b": {"lr": 0.3}})
    assert settings.load(path) == ("two", {"a": {"lr": 0.1}, "b": {"lr": 0.3}})
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"the best of 2 trials, not of 3.*other --results"):
        settings.save(path, "three", 3, {"b": {"lr": 0.4}})
    assert path.read_bytes() == before


def test_settings_are_kept_with_the_command_that_found_them(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "settings.json"
    assert settings.load(path) == ("", {})
    settings.save(path, "the command", 2, {"a": {"lr": 0.123456, "rates.x": 2.0}})
    assert settings.load(path) == ("the command", {"a": {"lr": 0.1235, "rates.x": 2.0}})
    assert settings.folded({"lr": 0.1, "rates.x": 2.0, "rates.y": 1.0, "alpha": 0.5}) == (
        0.1,
        {"rates": {"x": 2.0, "y": 1.0}, "alpha": 0.5},
    )
    for damaged in ("{", "[]", '{"found by": "x", "settings": {"a": {}}}', '{"settings": 1}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            settings.load(path)
