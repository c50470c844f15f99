"""All that needs a GPU, in one call of less than ten minutes: `make gpu OUT=folder`.

Libraries, kernels against the CPU, speed, tests, compute-sanitizer, Nsight Compute, a training
step: gpu_plan.py has the stages and their times. Failed jobs run again with full traces at the
end. The stages write to a scratch folder; after each of them and each row of the benchmark, OUT
holds `summary.md` and one archive of everything, so that nothing is lost when the time is over.

Needs nvcc, a CUDA build of PyTorch, and what the tests and benchmarks import; installs nothing.
`--rehearse` runs everything on the CPU, small. Exit code 1 if a stage failed or did not end in
time, 2 if nothing could begin.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import gpu_plan
import processes
from gpu_plan import Group, Setting, Stage
from gpu_report import Outcome, Report, show

ROOT = Path(__file__).resolve().parents[1]
# The terminal shows so many lines of the log of a stage that failed.
SHOWN_LINES = 30
# It runs in a process of its own: a context here would stay on the GPU for the whole run.
DESCRIBE = """
import importlib.util, json, os, platform, torch
found = {"available": torch.cuda.is_available()}
if found["available"]:
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.mem_get_info()[1] / 2**30
    found["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB"
    found["capability"] = f"{major}.{minor}"
found["PyTorch"] = f"{torch.__version__} (CUDA {torch.version.cuda})"
if importlib.util.find_spec("triton"):
    import triton
    found["Triton"] = triton.__version__
found["Python"] = f"{platform.python_version()}, {os.cpu_count()} cores"
print(json.dumps(found))
"""


class CannotBegin(SystemExit):
    """One sentence, and exit code 2."""

    def __init__(self, sentence: str) -> None:
        print(f"make gpu: {sentence}", file=sys.stderr)
        super().__init__(2)


def last_line(command: Sequence[str], seconds: float = 60.0) -> str:
    """The last line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else ""


def describe(python: str, *, rehearsal: bool) -> dict[str, str]:
    """The machine and the versions that the results depend on.

    Raises:
        CannotBegin: there is no GPU, no CUDA build of PyTorch, or no nvcc.
    """
    answer = last_line([python, "-c", DESCRIBE])
    if not answer:
        raise CannotBegin(f"{python} has no PyTorch (PYTHON=... names another Python)")
    found = json.loads(answer)
    available = found.pop("available")
    if rehearsal:
        return {**found, "GPU": "none: a rehearsal on the CPU", "capability": ""}
    if "(CUDA None)" in found["PyTorch"]:
        raise CannotBegin(
            f"the PyTorch {found['PyTorch'].split()[0]} of {python} was built without CUDA "
            "(PYTHON=... names another Python)"
        )
    if not available:
        raise CannotBegin(f"PyTorch {found['PyTorch']} of {python} sees no NVIDIA GPU")
    nvcc = processes.cuda_tool("nvcc")
    if nvcc is None:
        raise CannotBegin("nvcc is neither on PATH nor in the CUDA toolkit that CUDA_HOME names")
    found["nvcc"] = last_line([nvcc, "--version"])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = last_line(query) or "unknown"
    return found


def folder_for_results(output: Path) -> Path:
    """The folder, made and tried.

    Raises:
        CannotBegin: nothing can be written there.
    """
    output = output.resolve()
    trial = output / "summary.md"
    try:
        output.mkdir(parents=True, exist_ok=True)
        trial.write_text("make gpu has begun.\n")
    except OSError as error:
        raise CannotBegin(f"OUT={output} cannot be written: {error.strerror}") from error
    return output


class Runner:
    """Runs stages and keeps the report up to date.

    Args:
        report: The report, which takes the outcomes.
        scratch: The folder for logs.
        scale: Factor on all times; a rehearsal against stand-ins is quick.
    """

    def __init__(self, report: Report, scratch: Path, scale: float) -> None:
        self._report = report
        self._scratch = scratch
        self._scale = scale
        self._began = time.monotonic()
        self._environment = {"PYTHONUNBUFFERED": "1", **processes.importing_checkout()}

    def left(self, until: float) -> float:
        """Seconds until then."""
        return self._began + self._scale * until - time.monotonic()

    def group(self, group: Group, chosen: Sequence[str] | None = None) -> list[Outcome]:
        """Runs the stages of a group, or those of these names, side by side."""
        stages = [s for s in group.stages if chosen is None or s.name in chosen]
        if not stages:
            return []
        with ThreadPoolExecutor(len(stages)) as pool:
            try:
                outcomes = list(pool.map(lambda stage: self._stage(stage, group.until), stages))
            except BaseException:
                processes.end_all()
                raise
        self._report.outcomes += outcomes
        self._report.write()
        for outcome in outcomes:
            if not outcome.good:
                log = (self._scratch / f"{outcome.name}.log").read_text()
                print(
                    f"-- {outcome.name}: {outcome.word}", *log.splitlines()[-SHOWN_LINES:], sep="\n"
                )
        return outcomes

    def _stage(self, stage: Stage, until: float) -> Outcome:
        log = self._scratch / f"{stage.name}.log"
        left = self.left(until)
        if left <= 0:
            log.write_text("there was no time left\n")
            return Outcome(stage.name, None, 0.0, "—")
        environment = {**self._environment, **stage.environment}
        ended = processes.run(
            stage.command, log, left, environment=environment, cwd=ROOT, tick=self._report.pack
        )
        return Outcome(stage.name, ended.code, ended.seconds, stage.gist(log.read_text()))


def runs_cuda(scratch: Path) -> bool:
    """True if the first stage has left a CUDA library that loads."""
    try:
        reasons = json.loads((scratch / "backends.json").read_text())
    except (OSError, ValueError):
        return False
    return reasons.get("cuda", "unknown") is None


def again(runner: Runner, stages: Sequence[Stage], scratch: Path, failed: Sequence[str]) -> None:
    """Repeats what failed, while there is time."""
    repeated = []
    for stage in stages:
        command = stage.again(scratch) if stage.name in failed else None
        if command is not None:
            environment = {"CUDA_LAUNCH_BLOCKING": "1", **stage.environment}
            repeated.append(Stage(f"{stage.name}-again", command, stage.gist, environment))
    runner.group(Group(gpu_plan.END, tuple(repeated)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, and small")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "gpu", help="for all else")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all times")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds after an interrupt")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    options = parse(argv)
    # A shell may have started this with interrupts ignored, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes.GRACE_S = options.grace
    environment = describe(options.python, rehearsal=options.rehearse)
    capability, scratch = environment.pop("capability", ""), options.scratch.resolve()
    setting = Setting(options.python, scratch, capability, options.rehearse)
    first = gpu_plan.prepare(setting)
    groups = gpu_plan.groups(setting)
    known = [stage.name for group in [first, *groups] for stage in group.stages]
    for name in options.stages or []:
        if name not in known:
            raise CannotBegin(f"the stages are {', '.join(known)}; got {name!r}")
    output = folder_for_results(options.output)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    report = Report(output, scratch, environment)
    report.write()
    runner = Runner(report, scratch, options.scale)
    runner.group(first)
    if not runs_cuda(scratch) and not options.rehearse:
        groups = gpu_plan.groups(replace(setting, cuda=False))
    for group in groups:
        runner.group(group, options.stages)
    failed = [outcome.name for outcome in report.outcomes if not outcome.good]
    again(runner, [stage for group in groups for stage in group.stages], scratch, failed)
    show(report.outcomes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
