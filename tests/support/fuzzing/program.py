"""`make fuzz`: each target in a process of its own, for its share of the time.

A process is forked from one that has imported everything, so that a target costs no start. It
writes every call into a file before it makes it: what the file holds when a process has crashed is
what crashed it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.internal.conjecture import engine

from .calls import Call
from .judging import Found
from .machines import Plan, Step
from .targets import Target
from .values import Made, T

#: The cases of one round, after which the program looks at the time and changes the seed.
CASES = 100
#: The text of a call may name these.
PLAIN = {kind.__name__: kind for kind in (Call, Made, Plan, Step, T)}
SHRINKING_SECONDS = 20
#: A target that takes so much longer than its share hangs.
GRACE_SECONDS = 180.0


class Report(NamedTuple):
    """The end of a target's run: how many cases ran, and the keys of the findings."""

    cases: int
    found: list[str]
    seconds: float


def stored(folder: Path, key: str, text: str, call: Any = None) -> None:
    """Writes a finding's file, and the call that shows it, for the next run to begin with."""
    name = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
    (folder / "found").mkdir(parents=True, exist_ok=True)
    (folder / "found" / f"{name}.txt").write_text(f"{key}\n\n{text}\n")
    if call is not None:
        (folder / "found" / f"{name}.call").write_text(repr(call))


def still_found(target: Target, folder: Path) -> list[str]:
    """The keys of what earlier runs have kept and is there still; the files of the rest go."""
    known = []
    for path in sorted((folder / "found").glob("*.call")):
        try:
            call = eval(path.read_text(), PLAIN)
            target.judge(call)
        except Found as found:
            known.append(found.key)
            continue
        except Exception:  # written by another version
            pass
        path.unlink()
        path.with_suffix(".txt").unlink(missing_ok=True)
    return known


def _round(
    target: Target,
    options: settings,
    number: int,
    known: Sequence[str],
    over: Callable[[], bool],
    last: Path,
) -> tuple[int, tuple[Any, Found] | None, Exception | None]:
    """One run of Hypothesis: how many cases, the call that was found, shrunk, and the error."""
    count, key, failing = 0, None, None

    @seed(number)
    @options
    @given(target.calls())
    def case(call: Any) -> None:
        nonlocal count, key, failing
        if key is None and count and over():  # on a busy machine the first one comes late
            return
        count += 1
        last.write_text(repr(call))
        try:
            target.judge(call)
        except Found as found:
            # A finding that comes up while another one is being shrunk has its turn later.
            if found.key in known or key not in (None, found.key):
                return
            key, failing = found.key, (call, found)
            raise

    try:
        case()
    except Exception as error:
        return count, failing, error
    return count, None, None


def rounds(
    target: Target, seconds: float, first: int, folder: Path, *, cases: int | None = None
) -> Report:
    """Fuzzes a target in this process, for some seconds or a number of cases.

    Everything that has one key is reported once, shrunk; then it is passed over.
    """
    began = time.monotonic()
    engine.MAX_SHRINKING_SECONDS = SHRINKING_SECONDS
    folder.mkdir(parents=True, exist_ok=True)
    known = [] if cases else still_found(target, folder)
    count, number = 0, first

    def over() -> bool:
        return time.monotonic() - began > seconds

    while (not count or not over()) and (cases is None or count < cases):
        options = settings(
            max_examples=CASES if cases is None else min(CASES, cases - count),
            deadline=None,
            database=None,  # it forgets what is passed over
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        ran, failing, error = _round(target, options, number, known, over, folder / "last.txt")
        number, count = number + 1, count + ran
        if error is not None and failing is None:
            raise error
        if failing is not None:
            call, found = failing
            known.append(found.key)
            shown = target.describe(call) if isinstance(error, Found) else repr(call)
            stored(folder, found.key, f"{shown}\n\n{found}", call)
        elif not ran:
            break  # there are no other cases
    return Report(count, known, time.monotonic() - began)


def _child(target: Target, seconds: float, first: int, folder: Path) -> int:
    """Runs in the forked process, and returns its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(log)  # of a crash, who called what
    torch.set_num_threads(1)  # a fork has none of the threads that its parent started
    try:
        report = rounds(target, seconds, first, folder)
        (folder / "report.json").write_text(json.dumps(report))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        return 1
    return 0


def fuzz_one(
    name: str,
    target: Target,
    seconds: float,
    first: int,
    output: Path,
    *,
    grace: float = GRACE_SECONDS,
) -> Report:
    """Fuzzes a target in a process of its own; a crash, or a hang, is a finding."""
    folder = output / "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    (folder / "report.json").unlink(missing_ok=True)
    began = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_child(target, seconds, first, folder))
    status = None
    while status is None and time.monotonic() - began < seconds + grace:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
        time.sleep(0.02)
    took = time.monotonic() - began
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        key = f"{name}: it does not end"
    elif os.WIFSIGNALED(status):
        key = f"{name}: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    elif os.WEXITSTATUS(status):
        key = f"{name}: the fuzzer itself has failed"
    else:
        cases, keys, _ = json.loads((folder / "report.json").read_text())
        return Report(cases, keys, took)
    last = folder / "last.txt"
    call = last.read_text() if last.exists() else "before its first call"
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    stored(folder, key, f"the last call:\n{call}\n\n{log[-4000:]}")
    return Report(-1, [key], took)


def table(reports: Mapping[str, Report]) -> list[str]:
    """A line for each target, and the sum."""
    lines = [f"{'target':42} {'cases':>8} {'seconds':>8} {'found':>6}"]
    for name, (cases, found, seconds) in reports.items():
        shown = str(cases) if cases >= 0 else "?"
        lines.append(f"{name:42} {shown:>8} {seconds:8.1f} {len(found):6}")
    cases = sum(max(report.cases, 0) for report in reports.values())
    found = sum(len(report.found) for report in reports.values())
    seconds = sum(report.seconds for report in reports.values())
    lines.append(f"{f'{len(reports)} targets':42} {cases:8} {seconds:8.1f} {found:6}")
    return lines


def main(
    found: Mapping[str, Target],
    names: Sequence[str],
    minutes: float,
    output: Path,
    *,
    first: int,
    say: Callable[[str], None] = print,
) -> int:
    """Shares the time over the targets, prints the table, and returns the exit code."""
    share = 60 * minutes / max(len(names), 1)
    reports: dict[str, Report] = {}
    for name in names:
        reports[name] = report = fuzz_one(name, found[name], share, first, output)
        for key in report.found:
            say(f"found: {key}")
    for line in table(reports):
        say(line)
    failed = sum(len(report.found) for report in reports.values())
    if failed:
        say(f"{failed} found; {output}/*/found has each one, with the call that shows it")
    return 1 if failed else 0
