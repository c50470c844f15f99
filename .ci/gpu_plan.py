"""The stages of `make gpu`: what runs when, and for how long.

The order is that of worth. Times are seconds since the beginning; a stage that ends early leaves
its time to those that follow. Each command leaves its results in a folder of the scratch folder,
writes them as it goes, and exits with 77 where there is nothing to do it with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import SKIPPED

# Side by side; each holds a context on the GPU.
PROCESSES = min(12, os.cpu_count() or 1)
# These tell a kernel that waits for memory from one that waits for instructions; in one pass.
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__grid_size",
)
PROFILED = ("update_scale", "ogm_ge", "noisy_views", "mutual_information")

Gist = Callable[[str], str]
Again = Callable[[Path], Sequence[str] | None]


@dataclass(frozen=True)
class Setting:
    """The folders, programs and settings that the stages run with.

    Attributes:
        python: The interpreter, with PyTorch and the tests' packages.
        scratch: The folder for everything that the stages write.
        capability: Of the GPU, "9.0"; empty in a rehearsal.
        rehearsal: On the CPU, and small.
        cuda: True if the CUDA kernels can run.
    """

    python: str
    scratch: Path
    capability: str = ""
    rehearsal: bool = False
    cuda: bool = True

    @property
    def device(self) -> str:
        """The value of the scripts' --device."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: Of the stage, of its log, and of the folder that it writes to.
        command: Words.
        gist: Takes from its output what the summary says.
        environment: Added to this process's.
        again: The command that repeats what failed, with full traces; None if it cannot.
    """

    name: str
    command: Sequence[str]
    gist: Gist
    environment: Mapping[str, str] = field(default_factory=dict)
    again: Again = lambda _: None


@dataclass(frozen=True)
class Group:
    """Stages that run side by side until they end or the time comes."""

    until: float
    stages: tuple[Stage, ...]


def last_match(pattern: str) -> Gist:
    """The last line of an output in which the pattern occurs, without decoration."""

    def gist(output: str) -> str:
        found = [line for line in output.splitlines() if re.search(pattern, line)]
        return found[-1].strip("= ") if found else "—"

    return gist


def _repeated(command: Sequence[str], folder: str) -> Again:
    """The command with --again, if the stage has left the names of failed jobs."""

    def again(scratch: Path) -> Sequence[str] | None:
        failed = scratch / folder / "failed.json"
        if not failed.is_file() or not json.loads(failed.read_text()):
            return None
        return [*command, "--output", str(scratch / f"{folder}-again"), "--again", str(failed)]

    return again


def prepare(setting: Setting) -> Group:
    """The libraries, which are built here only if none was brought that loads."""
    command = [setting.python, ".ci/gpu_prepare.py", "--output", str(setting.scratch)]
    command += ["--capability", setting.capability] if setting.capability else []
    gist = last_match(r"^prepared: ")
    return Group(70, (Stage("library", command, gist),))


def groups(setting: Setting) -> list[Group]:
    """All that comes after `prepare`."""
    found = [
        Group(80, (*_kernels(setting), _words(setting))),
        Group(170, (_speed(setting, "speed", "gpu", 85),)),
        Group(320, (_tests(setting),)),
        Group(420, (_sanitizer(setting),)),
        Group(460, (_profile(setting),)),
        Group(500, (_speed(setting, "training", "gpu-training", 35),)),
    ]
    # However small the images, the two ResNets are whole: minutes on a CPU.
    return found[:-1] if setting.rehearsal else found


#: When what failed has been run again, too.
END = 560.0


def _limits(seconds: float, each: float) -> list[str]:
    workers = ["--workers", str(PROCESSES)]
    return [*workers, "--seconds", f"{seconds:g}", "--limit", f"{each:g}"]


def _kernels(setting: Setting) -> list[Stage]:
    """Each case against the CPU, in a process of its own."""
    script = [setting.python, "tests/kernels/every_kernel.py", "--each", "--device", setting.device]
    cases = ["--case", "discrepancy_ratios"] if setting.rehearsal else []
    found = []
    for backend in ("cuda", "triton") if setting.cuda else ("triton",):
        name = f"kernels-{backend}"
        command = [*script, "--backend", backend, *cases, *_limits(36, 30)]
        output = ["--output", str(setting.scratch / name)]
        gist = last_match(r"^kernels: ")
        again = _repeated(command, name)
        found.append(Stage(name, [*command, *output], gist, again=again))
    return found


def _words(setting: Setting) -> Stage:
    """The fast functions of the noise."""
    command = [setting.python, "tests/kernels/all_words.py", "--device", setting.device]
    command += ["--stride", "262145"] if setting.rehearsal else []
    command += ["--output", str(setting.scratch / "words")]
    return Stage("words", command, last_match(r"^all_words: "))


def _speed(setting: Setting, name: str, plan: str, seconds: float) -> Stage:
    """The benchmark writes each row as soon as it is known."""
    command = [setting.python, "benchmarks/run.py", "--plan", plan, "--device", setting.device]
    command += ["--minutes", f"{seconds / 60:.3g}", "--output", str(setting.scratch / name)]
    command += ["--shrink", "65536", "--seconds", "0.1"] if setting.rehearsal else []
    return Stage(name, command, last_match(r"refused|written to"))


def _tests(setting: Setting) -> Stage:
    """The tests marked `gpu`; conftest.py knows which of them come first."""
    cache = f"cache_dir={setting.scratch / 'tests' / 'cache'}"
    pytest = [setting.python, "-m", "pytest", "-q", "-o", cache, "-n", str(PROCESSES)]
    # A kernel that hangs can only be ended with its process.
    pytest += ["--timeout", "60", "--timeout-method", "thread", "--max-worker-restart", "40"]
    # Small shares, so that the order is kept.
    pytest += ["--maxschedchunk", "4"]
    # Tensors of 2^31 elements take the time of many small tests.
    which = ["-m", "gpu", "--ignore", "tests/kernels/test_large.py"]
    if setting.rehearsal:
        which = ["tests/test_main.py"]
    backends = ["reference", "triton", *(["cuda"] if setting.cuda else [])]
    required = ",".join(f"{backend}@gpu" for backend in backends)
    environment = {} if setting.rehearsal else {"MMFUSE_REQUIRE_BACKENDS": required}
    command = [*pytest, *which, "--maxfail", "100", "--session-timeout", "140", "--tb", "short"]

    def again(_: Path) -> Sequence[str]:
        traces = ["--last-failed", "--last-failed-no-failures", "none", "--tb", "long", "-l"]
        return [*pytest, *which, *traces, "--maxfail", "20"]

    gist = last_match(r"\d+ (passed|failed|error)|no tests ran")
    return Stage("tests", command, gist, environment, again)


def _sanitizer(setting: Setting) -> Stage:
    gist = last_match(r"^sanitizer: ")
    if not setting.cuda:
        return Stage("sanitizer", [setting.python, "-c", f"exit({SKIPPED})"], gist)
    command = [setting.python, "tests/kernels/every_kernel.py", "--sanitizer", *_limits(95, 60)]
    output = ["--output", str(setting.scratch / "sanitizer")]
    return Stage("sanitizer", [*command, *output], gist, again=_repeated(command, "sanitizer"))


def _profile(setting: Setting) -> Stage:
    command = [setting.python, ".ci/gpu_profile.py", "--metrics", ",".join(METRICS)]
    command += ["--probe", str(setting.scratch / "words" / "all_words"), "--calls", *PROFILED]
    command += ["--device", setting.device]
    return Stage("profile", command, last_match(r"^profile: |==ERROR=="))
