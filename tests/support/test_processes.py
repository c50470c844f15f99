"""Commands end with their limit, with all that they have started, and their logs stay small."""

from __future__ import annotations

import sys
from pathlib import Path

import processes
import pytest
from processes import HEAD_BYTES, TAIL_BYTES, Log, has_ended


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 1.0)


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def test_output_exit_code_and_environment(tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['MARK'], os.getcwd()); sys.stderr.write('more\\n')"
    log = tmp_path / "log"
    ended = processes.run(
        python(program + "; sys.exit(3)"), log, 20, environment={"MARK": "7"}, cwd=tmp_path
    )
    assert ended.code == 3
    assert set(log.read_text().splitlines()) == {f"7 {tmp_path}", "more"}


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    assert processes.run(["no-such-program"], tmp_path / "log", 20).code == 127
    assert (tmp_path / "log").read_text() == "no-such-program: No such file or directory\n"


def test_an_interrupted_command_may_report(tmp_path: Path) -> None:
    program = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("found: 7 failures", flush=True)
"""
    ended = processes.run(python(program), tmp_path / "log", 3.0)
    assert ended.code is None and ended.seconds < 10
    assert (tmp_path / "log").read_text().splitlines() == ["begun", "found: 7 failures"]


def stubborn(seconds: int, apart: bool = False) -> str:
    """A program that ignores the interrupt, with a child, `apart` in a session of its own."""
    return f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, start_new_session={apart})
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("apart", [False, True], ids=["its group", "a group of its own"])
@pytest.mark.parametrize("seconds", [60, 0], ids=["stopped", "ends by itself"])
def test_what_a_command_has_started_ends_with_it(tmp_path: Path, seconds: int, apart: bool) -> None:
    """Groups of their own are those of a program that is killed before it can kill them."""
    ended = processes.run(python(stubborn(seconds, apart)), tmp_path / "log", 1.5)
    assert ended.code == (None if seconds else 0)
    assert ended.seconds < 10
    assert has_ended(int((tmp_path / "log").read_text()))


def test_the_log_is_there_while_the_command_runs(tmp_path: Path) -> None:
    seen = []
    program = "import time; print('early', flush=True); time.sleep(1)"
    log = tmp_path / "log"
    processes.run(python(program), log, 20, tick=lambda: seen.append(log.read_text()), tick_s=0.1)
    assert "early\n" in seen


def test_a_flood_leaves_its_two_ends(tmp_path: Path) -> None:
    program = """
import sys
print("first")
for _ in range(200):
    sys.stdout.write("x" * 99999 + "\\n")
print("last")
"""
    log = tmp_path / "log"
    assert processes.run(python(program), log, 60).code == 0
    text = log.read_text()
    assert len(text) < HEAD_BYTES + TAIL_BYTES + 100
    assert text.startswith("first\n") and text.endswith("\nlast\n")
    whole = len("first\n" + "last\n") + 200 * 100_000
    assert f"[... {whole - HEAD_BYTES - TAIL_BYTES} bytes left out ...]" in text


def test_a_log_that_fits_is_whole(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    expected = b""
    for n in range(40):
        piece = bytes([65 + n % 26]) * (n * 1000)
        expected += piece
        log.add(piece)
    assert log.text() == expected.decode()


def test_ending_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt of the caller ends all processes in this way."""
    monkeypatch.setattr(processes, "_ending", type(processes._ending)())
    pids: list[int] = []

    def tick() -> None:
        found = (tmp_path / "log").read_text()
        if found:
            pids.append(int(found))
            processes.end_all()

    ended = processes.run(python(stubborn(60)), tmp_path / "log", 60, tick=tick, tick_s=0.1)
    assert ended.code == -9 and ended.seconds < 20
    assert has_ended(pids[0])
    assert processes.run(python("print('late')"), tmp_path / "late", 60).code is None
    assert (tmp_path / "late").read_text() == ""


def test_no_group_is_forgotten(tmp_path: Path) -> None:
    processes.run(python(""), tmp_path / "log", 20)
    assert processes._groups == set()
