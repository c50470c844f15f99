"""Thousands of steps of all methods on two ranks: memory, equality, and the death of a rank.

`make soak` runs it, as CI does; `make test` leaves it out.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
import soak
import torch
from balancing import ANCHORED

RANKS = 2
STEPS = 5000
LATE = STEPS // soak.CYCLE - 2
# The run that dies begins here, from a checkpoint of the other, and its ranks are killed in two
# methods of a late cycle that keep anchors. The last checkpoint then lies within an epoch.
BEGIN = LATE * soak.CYCLE // soak.SAVE_EVERY * soak.SAVE_EVERY
FIRST, SECOND = (LATE * soak.CYCLE + soak.KINDS.index(kind) * soak.VISIT for kind in ANCHORED[:2])
# The limit of one collective: longer than a rank ever waits for another on a busy machine.
TIMEOUT = 20.0
# Far beyond what any of this takes; it only ends a test that hangs.
LONGEST = 600.0

# The message depends on the survivor: was it reading, writing or elsewhere?
LOST = re.compile(r"(RuntimeError|DistBackendError): .*\bgloo\b.*(by peer|Broken pipe)")

pytestmark = pytest.mark.slow

Start = Callable[..., list[subprocess.Popen[bytes]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`soak.start`, with every rank ended by the end of the test."""
    started = []

    def begin(
        folder: Path, steps: int, ranks: int = RANKS, *, leak: bool = False
    ) -> list[subprocess.Popen[bytes]]:
        processes = soak.start(folder, ranks, steps, timeout=TIMEOUT, leak=leak)
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        process.kill()
        process.wait()


def errors(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.err")))


def succeed(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    codes = [process.wait(LONGEST) for process in processes]
    assert not any(codes), errors(folder)


def wait_for_step(
    processes: list[subprocess.Popen[bytes]], folder: Path, rank: int, step: int
) -> None:
    end = monotonic() + LONGEST
    while not any(done >= step for done in soak.told(folder, rank, "step")):
        assert all(process.poll() is None for process in processes), errors(folder)
        assert monotonic() < end, f"rank {rank} did not come to step {step}"
        sleep(0.01)


def kill(
    start: Start, folder: Path, victim: int, begin: int, step: int
) -> tuple[subprocess.Popen[bytes], float]:
    """Kills a rank after `step`; the other one, ended, and how long it has taken, in seconds."""
    processes = start(folder, STEPS)
    wait_for_step(processes, folder, victim, step)
    assert min(soak.told(folder, victim, "step")) == begin + soak.TELL_EVERY
    processes[victim].send_signal(signal.SIGKILL)
    killed = monotonic()
    survivor = processes[1 - victim]
    survivor.wait(LONGEST)
    taken = monotonic() - killed
    assert processes[victim].wait() == -signal.SIGKILL
    return survivor, taken


def test_five_thousand_steps_two_deaths_in_between_and_the_same_end(
    start: Start, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    succeed(start(straight, STEPS), straight)
    for rank in range(RANKS):
        (acted,) = soak.told(straight, rank, "acted")
        assert all(count > 0 for count in acted.values()), acted
        grown = soak.growth(straight, rank)
        assert grown["tensors"] <= 0 and grown["bytes"] <= 0, soak.told(straight, rank, "memory")
        assert grown["rss"] <= soak.RSS_NOISE, soak.told(straight, rank, "memory")

    broken.mkdir()
    begin = BEGIN
    shutil.copy(straight / f"step-{begin:06d}.pt", broken)
    for victim, step in ((1, FIRST + 10), (0, SECOND + 10)):
        survivor, taken = kill(start, broken, victim, begin, step)
        assert survivor.returncode == 1, errors(broken)
        # The connection breaks at once; a rank that does not notice waits for its collective's end.
        assert taken < TIMEOUT, f"it took {taken:.1f} s"
        *_, message = (broken / f"rank-{1 - victim}.err").read_text().splitlines()
        assert LOST.search(message), errors(broken)
        begin = int(soak.last_checkpoint(broken).stem.split("-")[1])
        assert step - soak.SAVE_EVERY < begin < STEPS
    succeed(start(broken, STEPS), broken)
    assert min(soak.told(broken, 0, "step")) == begin + soak.TELL_EVERY
    ours, theirs = (
        torch.load(folder / f"step-{STEPS:06d}.pt", weights_only=True)
        for folder in (broken, straight)
    )
    assert soak.differences(ours, theirs) == []


def test_a_leak_of_one_number_a_step_is_found(start: Start, tmp_path: Path) -> None:
    """The number of tensors shows it; the resident size of so few steps says nothing."""
    succeed(start(tmp_path, (soak.WARM_UP + 1) * soak.CYCLE, ranks=1, leak=True), tmp_path)
    assert soak.growth(tmp_path, 0)["tensors"] == soak.CYCLE
