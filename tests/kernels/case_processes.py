"""The cases of every_kernel.py, each in a process of its own, several side by side.

    python tests/kernels/every_kernel.py --each --backend cuda --backend triton

One illegal access leaves a GPU process unusable: whatever it runs afterwards fails as well. So each
case has its own, with a time limit and a log; `failed.json` in the folder names the jobs that did
not end well, and `--again failed.json` runs these once more, with every launch waited for and full
traces.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import processes
from processes import Ended

SCRIPT = Path(__file__).with_name("every_kernel.py")
# The terminal shows so many lines of the log of a job that failed.
SHOWN_LINES = 6
TRACES = {
    "CUDA_LAUNCH_BLOCKING": "1",
    "PYTHONFAULTHANDLER": "1",
    "TORCH_SHOW_CPP_STACKTRACES": "1",
}


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: Unique; also of its log.
        command: Words.
        environment: Added to this process's.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def case_command(device: str, backend: str, case: str, *more: str) -> list[str]:
    """The command line that runs one case."""
    words = [sys.executable, str(SCRIPT), "--device", device, "--backend", backend]
    return [*words, "--case", case, *more]


def run_jobs(
    jobs: Sequence[Job],
    output: Path,
    *,
    workers: int,
    end: float,
    limit_s: float,
    done: Callable[[Job, Ended], None],
) -> None:
    """Runs the jobs in their order, as many side by side as there are workers.

    Args:
        jobs: The cases to run.
        output: Folder for the logs.
        workers: How many run at once.
        end: When all must have ended, on the monotonic clock; what has not begun then is reported
            as not having ended, after 0 seconds.
        limit_s: For one job.
        done: Called in the worker's thread after each job.
    """
    # An interrupt reaches this process alone; what it has started is in sessions of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(job: Job) -> None:
        left = end - time.monotonic()
        log = output / f"{job.name}.log"
        ended = Ended(None, 0.0)
        if left > 0:
            limit = min(limit_s, left)
            ended = processes.run(job.command, log, limit, environment=job.environment)
        done(job, ended)

    output.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(workers)
    try:
        for future in [pool.submit(work, job) for job in jobs]:
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end_all()
        raise
    pool.shutdown()


class Failed:
    """The names of the jobs that did not end well, as `failed.json` in the folder has them.

    Jobs end in several threads, and the whole may be killed at any moment: the file is replaced at
    once, by one thread at a time.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._names: list[str] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str) -> None:
        """Writes the file again, with one more name."""
        with self._lock:
            self._names.append(name)
            draft = self._output / "failed.json.part"
            draft.write_text(json.dumps(sorted(self._names)))
            draft.replace(self._output / "failed.json")


def describe(ended: Ended) -> str:
    """E.g. "not begun in time", "killed by SIGSEGV", "exit code 1"."""
    if ended.code is None:
        return f"stopped after {ended.seconds:.0f} s" if ended.seconds else "not begun in time"
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}"
    return "passed" if ended.code == 0 else f"exit code {ended.code}"


def last_lines(log: Path, count: int = SHOWN_LINES) -> list[str]:
    """The end of a log, indented; nothing if there is none."""
    if not log.is_file():
        return []
    return [f"    {line}" for line in log.read_text().splitlines()[-count:]]


def main(
    device: str,
    backends: Sequence[str],
    cases: Sequence[str],
    output: Path,
    *,
    workers: int,
    seconds: float,
    limit_s: float,
    again: Path | None = None,
) -> int:
    """Runs and compares the cases; prints a line for each that failed, and a last one for all."""
    traces = {} if again is None else TRACES
    jobs = [
        Job(f"{backend}-{case}", case_command(device, backend, case, "--compare"), traces)
        for backend in backends
        for case in cases
    ]
    if again is not None:
        wanted = json.loads(again.read_text())
        jobs = [job for job in jobs if job.name in wanted]
    failed = Failed(output)

    def done(job: Job, ended: Ended) -> None:
        if ended.code != 0:
            failed.add(job.name)
            # It is written at once, in case there is no time left for the others.
            lines = last_lines(output / f"{job.name}.log")
            print("\n".join([f"{job.name}: {describe(ended)}", *lines]), flush=True)

    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    run_jobs(jobs, output, workers=workers, end=end, limit_s=limit_s, done=done)
    print(f"kernels: {len(jobs) - len(failed)} of {len(jobs)} cases agree with the reference")
    return 1 if failed else 0


def default_workers() -> int:
    """The number of cores, but 12 at most: each worker holds a context on the GPU."""
    return min(12, os.cpu_count() or 1)
