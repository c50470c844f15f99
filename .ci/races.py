"""Looks for races in the CUDA kernels without a GPU, in the host shim.

`make races`, `make race-mutants`. They are compiled again, into build/races, for GCC's
ThreadSanitizer, to which each thread of a block is a thread of its own: see
tests/kernels/cuda_on_cpu/races.h for what orders them. First, kernels that are misused on purpose
have to be reported, and those that are right must not be; then all cases of every_kernel.py run,
see tests/kernels/race_cases.py. Last, barriers, atomic additions and relaxed stores of csrc/cuda
are left out, one at a time, the first of each in each file or, with `--all`, every one: each has to
be reported. Exit code 1 if something was found, or was not found and should have been; 2 without
git or GCC's ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import processes
from case_processes import Job, describe, run_jobs
from instrumented import Build, begin
from processes import Ended

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "races"
# -g1 has the lines, which are all that a report needs; warnings are for the usual build.
FLAGS = f"-O1 -g1 -w -ffile-prefix-map={OUTPUT / 'checkout'}={ROOT}"
BUILD = Build(OUTPUT, shim=f"{FLAGS} -DMMFUSE_RACES", kernels="-fsanitize=thread")
RUNTIMES = ("libtsan.so",)
# Fibers are threads that never end. A larger history tells more often where the other access was.
OPTIONS = "history_size=4:report_thread_leaks=0:report_signal_unsafe=0:atexit_sleep_ms=0"
SECONDS = 900.0

SELF_CHECK = """
import ctypes, sys
getattr(ctypes.CDLL(sys.argv[1]), "run_" + sys.argv[2])((ctypes.c_int * 4096)())
"""
# Kernels of cuda_on_cpu/self_check.cu: wrong on purpose, and right.
WRONG = ("unordered", "unordered_warp", "unordered_blocks", "plain_count", "half_barrier")
RIGHT = ("rotate_block", "count", "reverse_warps", "positions")


def controls(self_check: str, environment: dict[str, str], logs: Path) -> int:
    """Runs the shim's own kernels; returns with how many something is wrong."""
    jobs = [
        Job(name, [sys.executable, "-c", SELF_CHECK, self_check, name], environment)
        for name in (*WRONG, *RIGHT)
    ]
    failed = []

    def done(job: Job, ended: Ended) -> None:
        reported = "WARNING: ThreadSanitizer: data race" in (logs / f"{job.name}.log").read_text()
        if reported != (job.name in WRONG) or bool(ended.code) != reported:
            failed.append(job.name)
            print(
                f"{job.name}: {'' if reported else 'NOT '}REPORTED, {describe(ended)}", flush=True
            )

    run_jobs(jobs, logs, workers=2, end=time.monotonic() + 120, limit_s=60, done=done)
    print(f"controls: {len(jobs) - len(failed)} of {len(jobs)} as they must be", flush=True)
    return len(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="leave out every ordering in turn")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    begun = begin(BUILD, RUNTIMES, "make races needs git, and GCC with libtsan")
    if begun is None:
        return 2
    self_check, preloaded = begun
    logs = OUTPUT / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    os.chdir(BUILD.copy)
    environment = {
        **BUILD.environment,
        "TSAN_OPTIONS": OPTIONS,
        "LD_PRELOAD": preloaded,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    bad = ["controls"] if controls(self_check, environment, logs) else []
    (cases,) = BUILD.copy.glob("tests/**/race_cases.py")
    sample = [] if options.all else ["--sample"]
    steps = {
        "cases": (["check"], {}),
        # With the first report all is said.
        "mutants": (
            ["mutants", *sample],
            {"TSAN_OPTIONS": f"{OPTIONS}:halt_on_error=1:symbolize=0"},
        ),
    }
    for name, (words, more) in steps.items():
        command = [sys.executable, str(cases), *words, "--output", str(logs)]
        ended = processes.run(
            command,
            logs / f"{name}.log",
            SECONDS,
            environment={**environment, **more},
        )
        print((logs / f"{name}.log").read_text(), end="", flush=True)
        if ended.code != 0:
            bad.append(name)
            print(f"{name}: {describe(ended)}")
    what = f"FAILED: {', '.join(bad)}; the logs are in {logs}" if bad else "nothing was found"
    print(f"races: {what}, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
