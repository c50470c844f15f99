"""`make gpu`, rehearsed against stand-ins that succeed, fail, hang and flood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_stand_ins
import pytest
from processes import has_ended

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci"
STAGES = [
    "library",
    "kernels-cuda",
    "kernels-triton",
    "words",
    "speed",
    "tests",
    "sanitizer",
    "profile",
    "training",
]
# Seconds of the plan in a second of the test.
SCALE = 0.03


class Rehearsal:
    """A run of `make gpu` with the stand-ins of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.programs = folder / "bin"
        self.python = gpu_stand_ins.install(self.programs)

    def __call__(
        self, *arguments: str, scale: float = 1.0, **modes: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs it; keywords say what a part does, with _ for -."""
        parts = {part.replace("_", "-"): mode for part, mode in modes.items()}
        stand_ins = gpu_stand_ins.environment(self.programs, parts)
        command = [sys.executable, str(CI / "gpu.py"), "--output", str(self.output)]
        command += ["--scratch", str(self.folder / "scratch"), "--python", str(self.python)]
        return subprocess.run(
            [*command, "--scale", str(scale), "--grace", "1", *arguments],
            env={
                **os.environ,
                **stand_ins,
                "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
                "CUDA_HOME": str(self.folder / "nowhere"),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )

    def summary(self) -> dict[str, tuple[str, str]]:
        """Stage → outcome and gist."""
        lines = (self.output / "summary.md").read_text().splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        names = [row for row in cells if row[0].removesuffix("-again") in STAGES]
        return {row[0]: (row[1], row[3]) for row in names}

    def archive(self) -> dict[str, str]:
        """Name → text of what is in the archive."""
        with tarfile.open(self.output / "results.tar.gz") as archive:
            files = [member for member in archive if member.isfile()]
            return {
                member.name.removeprefix("gpu/"): archive.extractfile(member)
                .read()
                .decode(errors="replace")
                for member in files
            }

    def started(self) -> list[int]:
        """Processes that hang, and what they have started."""
        found = self.programs / "pids"
        return [int(pid) for pid in found.read_text().split()] if found.is_file() else []


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


def small(output: Path) -> bool:
    """True if a machine that is lent gives the folder back: few files, none of them large."""
    files = list(output.iterdir())
    assert {file.name for file in files} == {"summary.md", "results.tar.gz"}
    return all(file.stat().st_size < 16 * 2**20 for file in files)


@pytest.mark.slow
def test_all_is_well(rehearsal: Rehearsal) -> None:
    done = rehearsal()
    assert done.returncode == 0, done.stdout + done.stderr
    summary = rehearsal.summary()
    assert list(summary) == STAGES
    assert {outcome for outcome, _ in summary.values()} == {"passed"}
    assert summary["library"][1] == "prepared: copy: 4300 GB/s"
    assert summary["kernels-cuda"][1] == "kernels: 14 of 14 cases agree with the reference"
    assert summary["words"][1].startswith("all_words: 4294967296 words: at most 46.0%")
    assert summary["tests"][1] == "7 passed in 3.00s"
    assert summary["sanitizer"][1].startswith("sanitizer: nothing was found")
    assert summary["profile"][1] == "profile: done"
    text = (rehearsal.output / "summary.md").read_text()
    assert "- GPU: NVIDIA H200, sm_90, 140 GiB" in text
    assert "- nvcc: release 13.0, V13.0" in text and "- driver: 580.159.04" in text
    assert "targets reached." in text
    files = rehearsal.archive()
    assert {"speed/results.csv", "training/results.csv", "environment.json"} <= set(files)
    assert "update_grads_kernel" in files["profile.log"]
    assert "ERROR SUMMARY" in files["sanitizer/racecheck-grad_stats.log"]
    assert small(rehearsal.output)


@pytest.mark.slow
def test_everything_fails(rehearsal: Rehearsal) -> None:
    """Each stage runs all the same; stages that can be repeated are repeated once."""
    modes = dict.fromkeys(("kernels", "pytest", "benchmark", "nvcc", "compute_sanitizer"), "fail")
    done = rehearsal(**modes)
    assert done.returncode == 1
    summary = rehearsal.summary()
    again = ["kernels-cuda-again", "kernels-triton-again", "tests-again", "sanitizer-again"]
    assert list(summary) == [*STAGES, *again], done.stdout + done.stderr
    for name in (*STAGES, *again):
        outcome = summary[name][0]
        if name == "library":
            assert outcome == "passed"
        elif name == "profile":  # without the program to try it on
            assert outcome == "skipped"
        else:
            assert outcome.startswith("failed (exit code "), name
    assert "pytest has failed" in done.stdout
    assert (
        "compute-sanitizer has failed" in rehearsal.archive()["sanitizer/memcheck-grad_stats.log"]
    )
    # The second time with full traces.
    assert small(rehearsal.output)


@pytest.mark.slow
def test_everything_hangs(rehearsal: Rehearsal) -> None:
    """The programs and the processes that they started ignore the interrupt."""
    parts = ("kernels", "pytest", "benchmark", "nvcc", "compute_sanitizer", "ncu")
    began = time.monotonic()
    done = rehearsal(scale=SCALE, **dict.fromkeys(parts, "hang"))
    assert done.returncode == 1
    # Seven groups one after the other, each with its grace, and what is read from logs.
    assert time.monotonic() - began < 560 * SCALE + 7 * 3 + 30
    summary = rehearsal.summary()
    assert [name for name in summary if not name.endswith("-again")] == STAGES
    for name in ("kernels-cuda", "words", "speed", "tests", "sanitizer", "training"):
        assert summary[name][0].startswith("stopped after "), name
    assert rehearsal.started() != []
    assert all(has_ended(pid) for pid in rehearsal.started())
    # The archive has all that was written before the end.
    assert "speed/results.csv" in rehearsal.archive()


@pytest.mark.slow
def test_everything_floods(rehearsal: Rehearsal) -> None:
    parts = ("kernels", "pytest", "benchmark", "ncu")
    done = rehearsal(**dict.fromkeys(parts, "flood"))
    assert done.returncode == 0, done.stdout + done.stderr
    # The summary's lines are those behind the flood.
    assert rehearsal.summary()["tests"] == ("passed", "7 passed in 3.00s")
    logs = rehearsal.archive()
    assert "bytes left out" in logs["tests.log"]
    assert all(len(text) < 2 * 2**20 for text in logs.values())
    assert small(rehearsal.output)


@pytest.mark.slow
def test_without_a_cuda_library_triton_goes_on(rehearsal: Rehearsal) -> None:
    done = rehearsal(build="fail")
    assert done.returncode == 1
    summary = rehearsal.summary()
    assert list(summary) == [name for name in STAGES if name != "kernels-cuda"]
    assert summary["library"][0] == "failed (exit code 1)"
    assert summary["sanitizer"][0] == "skipped"
    for name in ("kernels-triton", "speed", "tests", "training"):
        assert summary[name][0] == "passed", name


def test_only_some_stages(rehearsal: Rehearsal) -> None:
    assert rehearsal("--stages", "speed", "words").returncode == 0
    assert list(rehearsal.summary()) == ["library", "words", "speed"]


@pytest.mark.slow
def test_the_archive_has_what_a_stage_has_found_so_far(rehearsal: Rehearsal) -> None:
    """A run that is cut off leaves what it has."""
    parts = gpu_stand_ins.environment(rehearsal.programs, {"benchmark": "hang"})
    command = [sys.executable, str(CI / "gpu.py"), "--output", str(rehearsal.output)]
    command += ["--scratch", str(rehearsal.folder / "scratch"), "--python", str(rehearsal.python)]
    path = f"{rehearsal.programs}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [*command, "--stages", "speed"],
        env={**os.environ, **parts, "PATH": path},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        end = time.monotonic() + 60
        found: dict[str, str] = {}
        while "speed/results.csv" not in found and time.monotonic() < end:
            time.sleep(0.5)
            if (rehearsal.output / "results.tar.gz").is_file():
                found = rehearsal.archive()
        # `kill` from another terminal would do the same: the stage hangs until then.
        process.kill()
    for pid in rehearsal.started():
        os.kill(pid, 9)
    assert "speed/results.csv" in found


Refused = Callable[[dict[str, Any]], str]


@pytest.fixture
def refused(rehearsal: Rehearsal) -> Callable[..., str]:
    """Runs `make gpu` under conditions that forbid it; returns its one line."""

    def call(*arguments: str, machine: dict[str, Any] | None = None, **variables: str) -> str:
        stand_ins = gpu_stand_ins.environment(rehearsal.programs, {})
        if machine is not None:
            path = Path(stand_ins["STAND_IN_MACHINE"])
            path.write_text(json.dumps({**json.loads(path.read_text()), **machine}) + "\n")
        command = [sys.executable, str(CI / "gpu.py"), "--output", str(rehearsal.output)]
        done = subprocess.run(
            [*command, "--python", str(rehearsal.python), *arguments],
            env={**os.environ, **stand_ins, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("make gpu: ")
        assert not (rehearsal.output / "results.tar.gz").exists()
        return lines[0]

    return call


def test_it_cannot_begin(refused: Callable[..., str], tmp_path: Path) -> None:
    none = {"PyTorch": "2.13.0+cpu (CUDA None)", "available": False}
    assert "2.13.0+cpu of" in (line := refused(machine=none)) and "built without CUDA" in line
    assert "sees no NVIDIA GPU" in refused(machine={"available": False})
    tools = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "nowhere")}
    assert "nvcc is neither on PATH nor in" in refused(**tools)
    assert "has no PyTorch" in refused("--python", "/bin/false")
    assert "the stages are library, kernels-cuda, " in refused("--stages", "sped")
    (tmp_path / "file").touch()
    line = refused("--output", str(tmp_path / "file" / "out"))
    assert "cannot be written: Not a directory" in line


def test_on_this_machine_without_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(CI / "gpu.py"), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_the_scripts_take_what_the_plan_gives_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rehearsal: bool, cuda: bool
) -> None:
    """On a GPU a misspelt option would cost a stage."""
    for folder in (CI, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    import every_kernel
    import gpu_plan
    import profile_kernels
    import run as benchmark

    setting = gpu_plan.Setting("python", tmp_path, "" if rehearsal else "9.0", rehearsal, cuda)
    groups = [gpu_plan.prepare(setting), *gpu_plan.groups(setting)]
    stages = [stage for group in groups for stage in group.stages]
    parsed = set()
    for stage in stages:
        (tmp_path / stage.name).mkdir(exist_ok=True)
        (tmp_path / stage.name / "failed.json").write_text('["something"]')
        for command in filter(None, (stage.command, stage.again(tmp_path))):
            interpreter, script, *words = command
            assert interpreter == "python"
            if script == "tests/kernels/every_kernel.py":
                parsed.add(stage.name)
                assert every_kernel.parse(words).workers == gpu_plan.PROCESSES
            elif script == "benchmarks/run.py":
                parsed.add(stage.name)
                assert benchmark.parse(words).plan.startswith("gpu")
            elif script not in ("-m", "-c"):
                assert (ROOT / script).is_file(), script
    kernels = {"kernels-triton", *(["kernels-cuda", "sanitizer"] if cuda else [])}
    assert parsed == {"speed", *kernels, *([] if rehearsal else ["training"])}
    assert set(gpu_plan.PROFILED) <= set(profile_kernels.CALLS)
    # Times grow, and leave a minute of a call of ten.
    times = [group.until for group in groups] + [gpu_plan.END]
    assert times == sorted(times) and times[-1] <= 560


@pytest.mark.slow
def test_pytest_takes_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CI))
    import gpu_plan

    (tmp_path / "test_it.py").write_text("def test_one():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    setting = gpu_plan.Setting(sys.executable, tmp_path, "9.0")
    stage = next(s for g in gpu_plan.groups(setting) for s in g.stages if s.name == "tests")
    for command, code in ((stage.command, 5), (stage.again(tmp_path), 5)):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert "no tests ran" in done.stdout
