"""Each case runs in a process of its own: one that fails, dies or hangs harms no other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import case_processes
import every_kernel
import processes
import pytest

Run = Callable[..., int]

# A case does one of these, by its name; the last argument is its name's.
PROGRAM = """
import os, signal, sys, time
name, flags = sys.argv[1], os.environ.get("CUDA_LAUNCH_BLOCKING")
print(name, flags, flush=True)
if name == "dies": os.kill(os.getpid(), signal.SIGSEGV)
if name == "hangs": time.sleep(60)
if name == "differs": print("output 0: 1 of 9 differ"); sys.exit(1)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)

    def command(device: str, backend: str, case: str, *more: str) -> list[str]:
        assert (device, backend, more) == ("cuda", "cuda", ("--compare",))
        return [sys.executable, "-S", "-c", PROGRAM, case]

    monkeypatch.setattr(case_processes, "case_command", command)

    def call(
        *cases: str, seconds: float = 60.0, limit_s: float = 30.0, again: Path | None = None
    ) -> int:
        return case_processes.main(
            "cuda",
            ["cuda"],
            cases,
            tmp_path / "out",
            workers=2,
            seconds=seconds,
            limit_s=limit_s,
            again=again,
        )

    return call


def test_all_agree(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", "two") == 0
    assert capsys.readouterr().out == "kernels: 2 of 2 cases agree with the reference\n"
    assert (tmp_path / "out" / "cuda-one.log").read_text() == "one None\n"
    assert not (tmp_path / "out" / "failed.json").exists()


def test_some_fail(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dies", "differs", "good", "hangs", limit_s=2.0) == 1
    out = capsys.readouterr().out
    assert "cuda-dies: killed by SIGSEGV\n    dies None\n" in out
    assert "cuda-hangs: stopped after " in out
    assert "cuda-differs: exit code 1\n    differs None\n    output 0: 1 of 9 differ\n" in out
    assert out.endswith("kernels: 1 of 4 cases agree with the reference\n")
    failed = tmp_path / "out" / "failed.json"
    assert json.loads(failed.read_text()) == ["cuda-dies", "cuda-differs", "cuda-hangs"]
    assert run("dies", "hangs", "differs", "good", limit_s=2.0, again=failed) == 1
    out = capsys.readouterr().out
    assert "differs 1\n" in out  # every launch is waited for
    assert out.endswith("kernels: 0 of 3 cases agree with the reference\n")


def test_what_has_not_begun_in_time_has_failed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hangs", "hangs", "good", seconds=1.0) == 1
    out = capsys.readouterr().out
    assert "cuda-good: not begun in time\n" in out
    assert out.endswith("kernels: 0 of 3 cases agree with the reference\n")


def test_the_command_of_a_case_is_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    words = case_processes.case_command("cpu", "triton", "redundancy_ratio", "--compare")
    assert words[:2] == [sys.executable, str(Path(every_kernel.__file__))]
    options = every_kernel.parse(words[2:])
    assert (options.device, options.backend, options.compare) == ("cpu", ["triton"], True)
    assert options.case == ["redundancy_ratio"]


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    failed = case_processes.Failed(tmp_path)
    names = [f"{'long' * (n % 40)}-{n}" for n in range(200)]
    read = []
    with ThreadPoolExecutor(8) as pool:
        for name in names:
            pool.submit(failed.add, name)
            if (tmp_path / "failed.json").is_file():
                read.append(json.loads((tmp_path / "failed.json").read_text()))
    assert sorted(names) == json.loads((tmp_path / "failed.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["failed.json"]
