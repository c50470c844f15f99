"""Two commits in turns: the comparison tells a slower case from noise."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import compare
import pytest
from compare import Change
from engine import environment, results
from engine.rows import Row


def row(provider: str, ms: float, host: float | None = 20.0) -> Row:
    labels = {"case": "ogm_ge", "title": "x", "workload": "w", "dtype": "float32", "device": "cpu"}
    rest = dict.fromkeys(Row.__dataclass_fields__)
    return Row(**{**rest, **labels, "provider": provider, "median_ms": ms, "host_us": host})


class Machine:
    """Two commits on a machine with noise; the second one takes `factor` times as long."""

    def __init__(self, factor: float, noise: float = 0.02, drift: float = 0.0) -> None:
        self.factor, self.noise, self.drift = factor, noise, drift
        self.random = random.Random(3)
        self.order: list[str] = []

    def __call__(self, commit: str, number: int) -> list[Row]:
        self.order.append(commit)
        speed = 1 + self.drift * len(self.order)
        speed *= 1 + self.noise * (2 * self.random.random() - 1)
        mine = self.factor if commit == "b" else 1.0
        return [row("foreach", 30 * speed), row("cpu", 10 * speed * mine, 20 * mine)]


def verdicts(machine: Machine, runs: int = 5) -> dict[str, str]:
    found = compare.changes(*compare.take_turns(("a", "b"), runs, machine))
    return {change.key[3]: change.verdict for change in found}


def test_runs_take_turns_so_that_a_drift_hits_both() -> None:
    machine = Machine(1.0)
    compare.take_turns(("a", "b"), 4, machine)
    assert "".join(machine.order) == "abbaabba"
    # Thirty per cent from the first run to the last one.
    assert verdicts(Machine(1.0, drift=0.03)) == {"foreach": "within noise", "cpu": "within noise"}


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.10, 0.02, "slower"),
        (0.90, 0.02, "faster"),
        (1.00, 0.02, "within noise"),
        # Beyond noise, but not worth a word.
        (1.02, 0.0, "within noise"),
        # The noise is larger than the change.
        (1.10, 0.30, "within noise"),
    ],
)
def test_what_is_beyond_noise(factor: float, noise: float, verdict: str) -> None:
    assert verdicts(Machine(factor, noise)) == {"foreach": "within noise", "cpu": verdict}


def test_one_run_that_overlaps_is_enough_to_doubt() -> None:
    key = ("c", "w", "float32", "cpu")
    assert Change(key, [1.0, 1.0, 1.0], [1.2, 1.2, 1.2]).verdict == "slower"
    assert Change(key, [1.0, 1.0, 1.3], [1.2, 1.2, 1.2]).verdict == "within noise"
    assert Change(key, [1.0, 1.0, 1.3], [1.2, 1.2, 1.2]).noise == pytest.approx(0.3)


def test_the_table_names_what_got_slower_first_and_a_machine_that_moved() -> None:
    before = [[row("foreach", 30.0), row("cpu", 10.0)]] * 2
    after = [[row("foreach", 33.0), row("cpu", 20.0, 40.0)]] * 2
    lines = compare.table(compare.changes(before, after), ("aaa", "bbb"))
    assert "| **slower**, the control |" in lines[2] and "| 1.10× |" in lines[2]
    assert lines[3].startswith("| ogm_ge | w, float32 | cpu | 10.0 ms | 20.0 ms | 2.00× | 0% |")
    assert "| 20.0 µs | 40.0 µs | **slower**, host **slower** |" in lines[3]
    assert lines[-3] == "The machine has drifted: foreach, the same in both, moved 1 ×."
    assert lines[-1] == "1 of 2 got slower beyond noise."


def test_a_case_that_one_run_lacks_is_left_out_and_host_times_may_be_missing() -> None:
    before = [[row("foreach", 30.0), row("cpu", 10.0, None)], [row("cpu", 10.0)]]
    (change,) = compare.changes(before, [[row("cpu", 10.0)]] * 2)
    assert change.key[3] == "cpu" and change.host is None


@pytest.mark.parametrize(("ratio", "verdict"), [(1.18, "within noise"), (1.3, "slower")])
def test_what_moves_no_more_than_the_control_is_noise(ratio: float, verdict: str) -> None:
    before = [[row("foreach", 30.0 + n), row("cpu", 10.0)] for n in range(3)]
    after = [[row("foreach", 36.0 + n), row("cpu", 10.0 * ratio)] for n in range(3)]
    found = {c.key[3]: c for c in compare.changes(before, after)}
    assert found["cpu"].drift == pytest.approx(37 / 31 - 1)
    assert found["cpu"].verdict == verdict


def test_a_host_that_got_slower_counts_where_the_call_is_within_noise() -> None:
    before = [[row("cpu", ms, 20.0)] for ms in (10.0, 20.0)]
    after = [[row("cpu", ms, 30.0)] for ms in (11.0, 21.0)]
    found = compare.changes(before, after)
    assert [(c.verdict, c.host_verdict) for c in found] == [("within noise", "slower")]
    assert compare.got_slower(found) == found
    assert compare.table(found, ("aaa", "bbb"))[-1] == "1 of 1 got slower beyond noise."
    control = compare.changes(
        [[row("foreach", 10.0, 20.0)]] * 2, [[row("foreach", 20.0, 40.0)]] * 2
    )
    assert compare.got_slower(control) == []


def test_runs_that_have_nothing_in_common_compare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "git", lambda *_: "0123456789")
    monkeypatch.setattr(compare, "checkout", lambda commit: Path())
    monkeypatch.setattr(compare, "runner", lambda words: lambda commit, number: [])
    with pytest.raises(SystemExit, match="nothing was compared: --cases"):
        compare.main(["a", "b", "--runs", "2"])


def test_one_run_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["a", "b", "--runs", "1"])
    assert "noise" in capsys.readouterr().err


def test_another_commit_than_was_asked_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    monkeypatch.setattr(compare, "checkout", lambda commit: tmp_path)
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    facts = results.Facts({"mmfuse": "0.1.0, commit abc-dirty"})
    monkeypatch.setattr(results, "load", lambda folder: ([row("cpu", 1.0)], facts))
    assert len(compare.runner([])("abc", 0)) == 1
    with pytest.raises(SystemExit, match="not def was measured"):
        compare.runner([])("def", 0)


def test_the_commit_is_that_of_the_package_that_is_measured() -> None:
    import mmfuse

    assert Path(mmfuse.__file__).resolve().parents[1] == environment._ROOT
