"""All that needs a GPU, in one run: `make gpu OUT=folder`, on a machine with one.

Builds the CUDA kernels, runs the tests marked `gpu` and beside them compute-sanitizer on every
kernel, then with nothing beside them the benchmark and, where it is installed, Nsight Compute.
Needs nvcc, a CUDA build of PyTorch, and what the tests and benchmarks import; installs nothing.
Every stage leaves its log in the folder, and `summary.md` says what became of it. Exit code 1 if a
stage failed or did not end in time, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = "reference@gpu,triton@gpu,cuda@gpu"
# More would only wait for each other: the GPU runs one kernel of this size at a time.
TEST_PROCESSES = 8
# What says whether a kernel waits for memory, for instructions or for neither.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: Of the stage, and of its log.
        command: Words.
        seconds: It is stopped after these, or at the end of the whole run.
        environment: Added to this process's.
        gist: Takes from its output what the summary says.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str]
    gist: Callable[[str], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; `code` is None where it did not end in time."""

    stage: Stage
    code: int | None
    seconds: float
    gist: str

    @property
    def word(self) -> str:
        """For the summary."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return "passed" if self.code == 0 else f"failed (exit code {self.code})"


def last_match(pattern: str) -> Callable[[str], str]:
    """The last line of an output in which the pattern occurs, without decoration."""

    def gist(output: str) -> str:
        found = [line for line in output.splitlines() if re.search(pattern, line)]
        return found[-1].strip("= ") if found else "—"

    return gist


def stages(output: Path, benchmark_minutes: float) -> list[list[Stage]]:
    """The stages; those of one list run side by side."""
    python = sys.executable
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-n", str(TEST_PROCESSES), "-p", "no:cacheprovider"]
    sanitizer = ["tests/every_kernel.py", "--sanitizer", "--output", str(output)]
    benchmark = ["benchmarks/run.py", "--device", "cuda", "--minutes", str(benchmark_minutes)]
    plan = [
        [
            Stage(
                "build",
                [python, "setup.py", "build_ext", "--inplace"],
                240,
                {"MMFUSE_CUDA": "1"},
                lambda _: os.environ.get("TORCH_CUDA_ARCH_LIST", "the default architectures"),
            )
        ],
        [
            Stage(
                "tests",
                [python, *tests],
                240,
                {"MMFUSE_REQUIRE_BACKENDS": REQUIRED},
                last_match(r"\d+ (passed|failed|error)"),
            ),
            Stage("sanitizer", [python, *sanitizer], 240, {}, last_match(r"error|kernels")),
        ],
        [
            Stage(
                "benchmark",
                [python, *benchmark, "--output", str(output)],
                60 * benchmark_minutes + 60,
                {},
                last_match(r"refused|written to"),
            )
        ],
        [
            Stage(
                "targets",
                [python, "benchmarks/targets.py", str(output / "results.csv")],
                60,
                {},
                last_match(r"of \d+ targets"),
            )
        ],
    ]
    profiler = shutil.which("ncu")
    if profiler is not None:
        # The card's clocks are left as they are, and PyTorch's kernels out.
        options = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
        names = ["--kernel-name-base", "demangled", "--kernel-name", "regex:mmfuse"]
        command = [profiler, *options, *names, python, "benchmarks/profile_kernels.py"]
        plan.append([Stage("profile", command, 120, {}, last_match("==ERROR==|gpu__time"))])
    return plan


def run(stage: Stage, output: Path, end: float) -> Outcome:
    """Runs a stage until it ends, its time is over, or that of the whole run."""
    log = output / f"{stage.name}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = path
    began = time.monotonic()
    limit = min(stage.seconds, max(1.0, end - began))
    with log.open("w") as file:
        try:
            code = subprocess.run(
                stage.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    return Outcome(stage, code, time.monotonic() - began, stage.gist(log.read_text()))


def describe() -> dict[str, str]:
    """The GPU and the versions that the results depend on.

    Raises:
        SystemExit: there is no GPU, no CUDA build of PyTorch, or no nvcc.
    """
    import torch

    if not torch.cuda.is_available():
        print(
            f"make gpu needs an NVIDIA GPU: PyTorch {torch.__version__} of {sys.executable} sees "
            "none (PYTHON=... names another Python)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or str(home / "bin" / "nvcc")
    if not Path(nvcc).is_file():
        print("make gpu needs nvcc, on the PATH or under CUDA_HOME", file=sys.stderr)
        raise SystemExit(2)
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.mem_get_info()[1] / 2**30
    return {
        "GPU": f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB",
        "driver": driver[0] if driver else "unknown",
        "PyTorch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "Triton": importlib.metadata.version("triton"),
        "nvcc": last_match("release")(compiler.stdout).rpartition("release ")[2],
        "Python": f"{platform.python_version()}, {os.cpu_count()} cores",
    }


def write_summary(
    output: Path, environment: dict[str, str], outcomes: Sequence[Outcome], seconds: float
) -> None:
    """Writes summary.md and environment.json."""
    (output / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    lines = ["# `make gpu`", "", *(f"- {key}: {value}" for key, value in environment.items())]
    lines += ["", "| stage | outcome | seconds | |", "|---|---|--:|---|"]
    lines += [f"| {o.stage.name} | {o.word} | {o.seconds:.0f} | {o.gist} |" for o in outcomes]
    lines += ["", f"{seconds:.0f} s in all."]
    targets = output / "targets.log"
    if targets.is_file():
        lines += ["", targets.read_text().rstrip()]
    (output / "summary.md").write_text("\n".join(lines) + "\n")


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints the table."""
    table = Table(box=None)
    for name in ("stage", "outcome", "seconds", ""):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for o in outcomes:
        table.add_row(o.stage.name, o.word, f"{o.seconds:.0f}", o.gist)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for the whole run")
    parser.add_argument("--benchmark-minutes", type=float, default=3.5)
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    options = parser.parse_args(argv)
    output = options.output.resolve()
    plan = stages(output, options.benchmark_minutes)
    known = [stage.name for group in plan for stage in group]
    for name in options.stages or []:
        if name not in known:
            parser.error(f"the stages are {', '.join(known)}; got {name!r}")
    environment = describe()
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    end = began + 60 * options.minutes
    outcomes: list[Outcome] = []
    for group in plan:
        chosen = [stage for stage in group if not options.stages or stage.name in options.stages]
        with ThreadPoolExecutor(len(group)) as pool:
            done = list(pool.map(lambda stage: run(stage, output, end), chosen))
        outcomes += done
        # After every stage, so that a run that is cut short leaves its results.
        write_summary(output, environment, outcomes, time.monotonic() - began)
        for outcome in done:
            if outcome.code != 0:
                print(
                    "\n".join((output / f"{outcome.stage.name}.log").read_text().splitlines()[-40:])
                )
        if any(o.stage.name == "build" and o.code != 0 for o in done):
            break
    show(outcomes)
    return 0 if all(o.code == 0 for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
