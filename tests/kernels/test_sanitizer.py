"""sanitizer.py runs each tool on each case, and reports their findings."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import every_kernel
import pytest
import sanitizer
from samples import CASES

# Reports an error for a control, and for the tool and case that FAKE_FAILS names; initcheck always
# reports one of PyTorch's kernels.
FAKE = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$FAKE_CALLS"
record() {
  echo "========= Uninitialized __global__ memory read of size 4 bytes"
  echo "=========     at $1 in file.cu:1"
  echo "=========     by thread (0,0,0) in block (0,0,0)"
  echo "========= "
}
case "$* " in
  *"--control "*) errors=2 ;;
  *"--tool ${FAKE_FAILS%-*} "*"--case ${FAKE_FAILS#*-} "*) errors=1 ;;
  *) errors=0 ;;
esac
[ "$FAKE_FILTER" = nothing ] && errors=0
case "$* " in
  *"$FAKE_HANGS "*) sleep 60 ;;
esac
case "$* " in
  *"$FAKE_SILENT "*) ;;
  *racecheck*) echo "= RACECHECK SUMMARY: $errors hazards displayed (0 errors, $errors warnings)";;
  *initcheck*)
    record "void at::native::fill_kernel<float>(float *)+0x10"
    [ $errors = 0 ] || record "void mmfuse::cuda::grad_stats_kernel<float>(int)+0x20"
    echo "========= ERROR SUMMARY: $((errors + 1)) errors" ;;
  *) echo "========= ERROR SUMMARY: $errors errors" ;;
esac
case "$*" in *error-exitcode*) [ "$errors" = 0 ] ;; esac
"""
TWO = ["grad_stats", "scale_grad"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer on PATH; returns the file to which it writes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "compute-sanitizer"
    program.write_text(FAKE)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    monkeypatch.setenv("FAKE_CALLS", str(calls))
    for name in ("FAILS", "SILENT", "HANGS"):
        monkeypatch.setenv(f"FAKE_{name}", "none-none")
    monkeypatch.setenv("FAKE_FILTER", "ours")
    return calls


def examine(
    output: Path, backend: str = "cuda", *, limit_s: float = 30.0, again: Path | None = None
) -> int:
    return sanitizer.main(
        output, backend, TWO, workers=2, seconds=120.0, limit_s=limit_s, again=again
    )


def test_the_command_lines(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "logs" / "here"
    assert every_kernel.main(["--sanitizer", "--output", str(output), "--workers", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        [tool, "clean"] for tool in sanitizer.TOOLS
    ]
    assert lines[-1].startswith("sanitizer: nothing was found")
    calls = fake.read_text().splitlines()
    assert len(calls) == len(CASES) * len(sanitizer.TOOLS) + 2
    seen = set()
    for call in calls:
        tool = re.search(r"--tool (\w+)", call)[1]
        control = re.search(r"--control (\w+)$", call)
        assert control is None or control[1] == tool
        seen.add((tool, "control" if control else re.search(r"--case (\w+)", call)[1]))
        assert call.startswith("1 ") == (tool in ("memcheck", "initcheck"))
        filtered = "--error-exitcode 1" in call and "--kernel-name kernel_substring=mmfuse" in call
        assert filtered == (tool != "initcheck")
        assert "every_kernel.py --device cuda --backend cuda" in call
        # The tools run without poisoned memory, and without a comparison, which is PyTorch's work.
        assert "--poison" not in call and "--compare" not in call
    controls = {(tool, "control") for tool in ("memcheck", "initcheck")}
    assert seen == {(tool, case) for tool in sanitizer.TOOLS for case in CASES} | controls
    assert "ERROR SUMMARY" in (output / "memcheck-grad_stats.log").read_text()


def test_races_and_addresses_come_first(tmp_path: Path) -> None:
    names = [job.name for job in sanitizer.jobs_of("sanitizer", "cuda", TWO)]
    tools = [name.split("-")[0] for name in names]
    assert tools[:2] == ["control"] * 2
    assert tools[2:] == [
        tool for tool in ("racecheck", "memcheck", "synccheck", "initcheck") for _ in TWO
    ]


@pytest.mark.parametrize("tool", list(sanitizer.TOOLS))
def test_an_error_in_a_tool_fails_the_run(
    fake: Path,
    tool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_FAILS", f"{tool}-grad_stats")
    assert examine(tmp_path / "logs") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    first, *tools, last = lines
    assert first.startswith(f"{tool}-grad_stats: 1 errors")
    assert [line.split()[0] for line in tools if line.split()[1] == "FAILED"] == [tool]
    assert any("1 of 2 cases clean" in line and "; grad_stats (1 errors" in line for line in tools)
    assert last.startswith("sanitizer: FAILED")
    failed = tmp_path / "logs" / "failed.json"
    assert json.loads(failed.read_text()) == [f"{tool}-grad_stats"]
    fake.unlink()
    monkeypatch.setenv("FAKE_FAILS", "none-none")
    assert examine(tmp_path / "again", again=failed) == 0
    calls = fake.read_text().splitlines()
    assert len([call for call in calls if "--control" not in call]) == 1


@pytest.mark.usefixtures("fake")
def test_a_tool_that_hangs_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_HANGS", "--case scale_grad")
    assert examine(tmp_path / "logs", limit_s=1.0) == 1
    out = capsys.readouterr().out
    assert "racecheck-scale_grad: no summary, stopped after" in out
    assert "racecheck  FAILED  1 of 2 cases clean; scale_grad (no summary, stopped" in out


@pytest.mark.usefixtures("fake")
def test_what_has_not_begun_is_not_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"workers": 2, "seconds": 0.0, "limit_s": 9.0}
    assert sanitizer.main(tmp_path / "logs", "cuda", TWO, **limits) == 1
    out = capsys.readouterr().out
    assert "memcheck   FAILED  0 of 2 cases clean; control: NOT REPORTED" in out
    assert "not begun in time" in out


@pytest.mark.usefixtures("fake")
def test_a_tool_without_a_summary_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool has not looked at anything, for example because the script could not start."""
    monkeypatch.setenv("FAKE_SILENT", "--case grad_stats")
    assert examine(tmp_path / "logs", "triton") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " FAILED " in line]
    assert [line.split()[0] for line in lines[: len(sanitizer.TOOLS)]] == list(sanitizer.TOOLS)
    assert all("grad_stats (no summary, passed)" in line for line in lines)


@pytest.mark.usefixtures("fake")
def test_a_filter_that_finds_nothing_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FILTER", "nothing")
    assert examine(tmp_path / "logs") == 1
    assert capsys.readouterr().out.count("NOT REPORTED (0 errors, passed)") == 2


def test_whose_kernel_read_what_was_not_written() -> None:
    report = (
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        "=========     at {}\n=========     Device Frame:{}\n"
        "=========     Host Frame: mmfuse/libmmfuse_cuda.so\n"
    )
    theirs = report.format("void at::native::vectorized_elementwise_kernel<4>()+0x10", "")
    older = report.format("0x150 in void mmfuse::cuda::range_kernel<float>(int)", "")
    inlined = report.format("__half2float(__half)", "void mmfuse::cuda::range_kernel<__half>(int)")
    triton = report.format("_update_grads_kernel+0x20 in update_grads.py:60", "")
    log = theirs + older + inlined + triton
    assert sanitizer.reads_of_ours(log, "cuda") is None
    # Reports that were not printed may be of our kernels.
    for errors, hidden in ((4, 0), (1004, 1000)):
        whole = f"{log}========= ERROR SUMMARY: {errors} errors\n"
        assert sanitizer.reads_of_ours(whole, "cuda") == 2 + hidden
        assert sanitizer.reads_of_ours(whole, "triton") == 1 + hidden
        assert sanitizer.errors_in(whole) == errors


def test_without_compute_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert examine(tmp_path / "logs") == 77
    assert "skipped, because compute-sanitizer is neither on PATH" in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()
