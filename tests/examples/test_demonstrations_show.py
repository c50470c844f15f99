"""The demonstrations' scripts on a stand-in: their output, and their settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from demonstrated import TASK

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

import animals
import wrist
from demonstrations import show
from demonstrations.baselines import Joint
from demonstrations.data import DataError
from demonstrations.tasks import TASKS
from demonstrations.training import Run
from demonstrations.ways import JOINT, OWN_LOSSES, ways

# Without the compiled library the examples run on the reference, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:mmfuse uses its:RuntimeWarning")


@pytest.fixture(params=[animals, wrist], ids=["animals", "wrist"])
def script(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ModuleType:
    """The script with the stand-in as its data set, and settings of its own."""
    module = request.param
    monkeypatch.setitem(module.TASKS, module.__name__, TASK)
    monkeypatch.setattr(show, "HERE", tmp_path)
    monkeypatch.setattr(show, "SPEED_STEPS", 2)
    return module


def run(script: ModuleType, folder: Path, *arguments: str) -> int:
    return script.main(["--no-report", "--batch-size", "32", "--output", str(folder), *arguments])


def test_it_prints_a_table_with_fair_pairs_and_draws_a_plot(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("--methods", JOINT, OWN_LOSSES, "OGM-GE", "MLB")
    assert run(script, tmp_path, "--quick", *methods) == 0
    printed = capsys.readouterr().out
    rows = [line.strip().split("  ")[0] for line in printed.splitlines()]
    assert f"MLB − {OWN_LOSSES}" in rows and "OGM-GE − joint" in rows
    assert "MLB − joint" not in rows
    for expected in ("Made here.", "96 train, 48 validation, 60 test", "noisy weak", "probe weak"):
        assert expected in printed
    assert "settings: not tuned" in printed
    png = tmp_path / f"{script.__name__}.png"
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert "imbalance report" not in printed and not list(tmp_path.glob("*.html"))


def test_it_writes_the_imbalance_report_of_the_first_way(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    assert script.main(["--quick", "--output", str(tmp_path), "--methods", JOINT, "OPM"]) == 0
    page = tmp_path / f"{script.__name__}_report.html"
    assert f"imbalance report of 'joint': {page}" in capsys.readouterr().out
    text = page.read_text()
    assert "another model, trained on it alone" in text and "ratio of both probes" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_a_package_it_says_what_to_install(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert script.main(["--quick", "--output", str(tmp_path), "--methods", JOINT]) == 0
    assert "needs torchmetrics: pip install torchmetrics" in capsys.readouterr().out


def test_it_says_which_command_found_its_settings(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / script.__name__ / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"found by": "the command", "settings": {JOINT: {"lr": 0.1}}}))
    assert run(script, tmp_path, "--quick", "--methods", JOINT) == 0
    assert "settings found by: the command" in capsys.readouterr().out


def test_damaged_settings_are_one_sentence(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / script.__name__ / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(SystemExit):
        run(script, tmp_path, "--quick", "--methods", JOINT)
    assert "settings.json is damaged: take it from the repository" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["OGM", "ensemble"])
def test_a_learning_rate_that_is_asked_for_goes_with_nothing_tuned(way: str) -> None:
    tuned = {"OGM": {"lr": 0.5, "alpha": 0.2}, "ensemble": {"lr": 0.5, "rates.weak": 0.7}}
    asked = show.parser("", TASK.views).parse_args(["--lr", "0.02"])
    asked.settings = tuned
    plan = show.plan_of(way, TASK, asked, 0)
    assert plan.lr == 0.02 and plan.options == {}
    method = Run(ways(TASK.views)[way], TASK.split(None, 0), plan, 3)
    assert {group["lr"] for group in method.optimizer.param_groups} == {0.02}
    asked.lr = None
    plan = show.plan_of(way, TASK, asked, 0)
    assert plan.lr == 0.5 and plan.options


def test_the_speed_has_its_share_of_what_begins_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(show.time, "perf_counter", lambda: clock[0])

    def later(seconds: float) -> None:
        clock[0] += seconds

    asked = show.parser("", TASK.views).parse_args(["--methods", JOINT, "--batch-size", "32"])
    asked.settings = {}
    monkeypatch.setattr(Run, "step", lambda self, *batch: later(0.25))
    monkeypatch.setattr(Joint, "set_epoch", lambda self, epoch: later(0.75))
    # An epoch has three steps of a quarter second, and begins with three quarters.
    found = show.steps_per_second(TASK, TASK.split(None, 0), asked)
    assert found == {JOINT: pytest.approx(2.0)}


def test_data_that_is_missing_is_one_sentence(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load() -> None:
        raise DataError("The file is not there: install it.")

    monkeypatch.setitem(script.TASKS, script.__name__, TASK._replace(load=load))
    assert run(script, tmp_path, "--quick") == 1
    assert capsys.readouterr().err == "The file is not there: install it.\n"


def test_the_default_is_what_the_demonstration_promises() -> None:
    promised = {JOINT, OWN_LOSSES, "OGM-GE", "InfoReg", "RedReg", "OPM", "ARM"}
    assert promised == set(show.DEFAULT) <= set(ways(TASK.views))


@pytest.mark.parametrize("task", ["animals", "wrist"])
def test_the_settings_in_the_repository_are_of_ways_that_there_are(task: str) -> None:
    path = Path(show.__file__).parents[1] / "results" / task / "settings.json"
    if not path.is_file():
        pytest.skip("not compared yet")
    command, found = show.load(path)
    assert command.startswith(f"python examples/compare_methods.py {task} --stages search")
    assert found.keys() <= ways(TASKS[task].views).keys()
    assert set(show.DEFAULT) <= found.keys()
