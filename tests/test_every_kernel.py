"""every_kernel.py leaves no kernel out, and sanitizer.py reports what its tools find."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import every_kernel
import pytest
import sanitizer
import torch
from cuda_on_cpu.launches import (
    SOURCES,
    Shim,
    counted_launches,
    declared,
    kernels_shim,
    short_name,
)
from every_kernel import CASES, not_written, run
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shim() -> Iterator[Shim]:
    if torch.cuda.is_available():
        pytest.skip("the CUDA kernels run on the GPU here, not in the host shim")
    try:
        every_kernel.load_shim()
    except RuntimeError as error:  # where it is required, conftest.py has failed already
        pytest.skip(f"the CUDA host shim does not build: {error}")
    shim = kernels_shim()
    yield shim
    shim.set_order("forward")
    shim.poison_shared(False)


@pytest.fixture(scope="module")
def reached(shim: Shim) -> tuple[Counter[str], dict[str, list[Tensor]]]:
    """Launches and results in the usual order, with new memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    every_kernel.poison()
    with counted_launches() as launches:
        written = run("cpu", "cuda")
    every_kernel.poison(before)
    return launches, written


def test_every_cuda_kernel_is_launched(
    shim: Shim, reached: tuple[Counter[str], dict[str, list[Tensor]]]
) -> None:
    launches, written = reached
    assert sorted(set(shim.kernels().values()) - set(launches)) == []
    assert [name for name, tensors in written.items() if not_written(tensors)] == []
    # Under a sanitizer each launch takes long.
    assert launches.total() < 1500
    # What has to be asked for, see csrc/cuda/launch.h.
    most = shim.most_shared()
    large = {name.split("<")[0] for name, shared in most.items() if shared > 48 * 1024}
    assert large == {"joint_histogram_kernel", "soft_histogram_kernel"}


def test_the_shim_has_every_kernel_of_the_sources(shim: Shim) -> None:
    assert {name.split("<")[0] for name in shim.kernels().values()} == set(
        declared(SOURCES, "__global__")
    )


@pytest.mark.slow
def test_the_shim_has_every_kernel_that_nvcc_compiles(shim: Shim, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc was not found")

    # Only the names matter: without its optimiser, the compiler takes a quarter of the time.
    options = ["-std=c++17", "-arch=compute_80", "-Xcicc", "-O0", "-ptx"]
    options += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]

    def entries(source: Path) -> list[str]:
        ptx = tmp_path / f"{source.name}.ptx"
        command = [nvcc, *options, str(source), "-o", str(ptx)]
        subprocess.run(command, check=True, capture_output=True, timeout=500)
        return re.findall(r"\.entry (\w+)\(", ptx.read_text())

    sources = [source for source in SOURCES if source.suffix == ".cu"]
    with ThreadPoolExecutor(2) as pool:
        symbols = "\n".join(name for names in pool.map(entries, sources) for name in names)
    plain = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True)
    names = [short_name(symbol) for symbol in plain.stdout.splitlines()]
    found = [name.replace("__half", "_Float16") for name in names]
    assert sorted(found) == sorted(shim.kernels().values())


@pytest.mark.parametrize(("order", "seed"), [("reverse", 0), ("random", 1)])
def test_no_result_depends_on_which_thread_goes_first(
    shim: Shim,
    reached: tuple[Counter[str], dict[str, list[Tensor]]],
    order: str,
    seed: int,
) -> None:
    """Nor on shared memory that a block has not written: that is NaN here."""
    names = declared(SOURCES, "__shared__")
    assert shim.poison_shared(True) >= len(names)
    shim.set_order(order, seed)
    try:
        written = run("cpu", "cuda")
    finally:
        shim.set_order("forward")
        shim.poison_shared(False)
    _, expected = reached
    different = [
        (name, i)
        for name, tensors in written.items()
        for i, tensor in enumerate(tensors)
        if not torch.equal(tensor, expected[name][i])
    ]
    assert different == []


def test_counts_and_flags_are_those_of_the_reference(
    reached: tuple[Counter[str], dict[str, list[Tensor]]],
) -> None:
    _, written = reached
    names = ["drop_modalities", "joint_entropies", "co_information_gate", "discrepancy_ratios"]
    expected = run("cpu", "reference", names)
    for name in names:
        for found, right in zip(written[name], expected[name], strict=True):
            assert found.shape == right.shape
            assert found.dtype == right.dtype
            if not found.is_floating_point():
                assert torch.equal(found, right)


def _triton_kernels() -> dict[str, object]:
    """The kernels that .ci/compile_triton.py compiles."""
    path = ROOT / ".ci/compile_triton.py"
    spec = importlib.util.spec_from_file_location("compile_triton", path)
    assert spec is not None and spec.loader is not None
    compile_triton = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compile_triton)
    return {
        kernel.__name__: kernel
        for module in compile_triton.modules()
        for kernel in compile_triton.kernels(module)
    }


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_every_triton_kernel_is_launched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the Triton kernels run on the GPU here, not in the interpreter")
    kernels = _triton_kernels()
    launched = set()
    kinds = {type(kernel) for kernel in kernels.values()}
    for kind in kinds:

        def counted(kernel: object, grid: object, _original: object = kind.__getitem__) -> object:
            launched.add(kernel.__name__)
            return _original(kernel, grid)

        monkeypatch.setattr(kind, "__getitem__", counted)
    written = run(device, "triton")
    assert sorted(set(kernels) - launched) == []
    assert all(not not_written(tensors) for tensors in written.values())


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    written = run("cuda", "cuda")
    assert all(not not_written(tensors) for tensors in written.values())


@pytest.mark.usefixtures("poisoned")
def test_what_is_not_written_is_found() -> None:
    assert not_written([torch.zeros(3), torch.empty(3)]) == [1]
    assert not_written([torch.empty(3, dtype=torch.int64), torch.zeros(0)]) == [0]
    assert not_written([torch.empty(3, dtype=torch.bfloat16), torch.ones(3) > 0]) == [0]


def test_the_script(
    shim: Shim, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--device", "cpu", "--case", "discrepancy_ratios"]
    assert every_kernel.main(arguments) == 0
    assert "every_kernel: 1 ops, 2 tensors" in capsys.readouterr().out
    monkeypatch.setitem(CASES, "discrepancy_ratios", lambda inputs: [torch.full((2,), torch.nan)])
    assert every_kernel.main(arguments) == 1
    assert "discrepancy_ratios: outputs [0]" in capsys.readouterr().out


# Reports an error for a control, and for the tool that FAKE_FAILS names; initcheck always reports
# one of PyTorch's kernels.
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
  *"--tool $FAKE_FAILS "*) errors=1 ;;
  *) errors=0 ;;
esac
[ "$FAKE_FILTER" = nothing ] && errors=0
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
    monkeypatch.setenv("FAKE_FAILS", "none")
    monkeypatch.setenv("FAKE_SILENT", "none")
    monkeypatch.setenv("FAKE_FILTER", "ours")
    return calls


def test_the_sanitizers_command_lines(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "logs" / "here"
    assert every_kernel.main(["--sanitizer", "--output", str(output)]) == 0
    assert "nothing was found" in capsys.readouterr().out
    calls = fake.read_text().splitlines()
    tools = [re.search(r"--tool (\w+)", call)[1] for call in calls]
    assert tools == ["memcheck"] * 2 + ["racecheck", "synccheck"] + ["initcheck"] * 2
    for tool, call in zip(tools, calls, strict=True):
        assert call.startswith("1 ") == (tool in ("memcheck", "initcheck"))
        filtered = "--error-exitcode 1" in call and "--kernel-name kernel_substring=mmfuse" in call
        assert filtered == (tool != "initcheck")
        assert "every_kernel.py --device cuda --backend cuda" in call
        assert "--poison" not in call
        assert "ERROR SUMMARY" in (output / f"{tool}.log").read_text() or tool == "racecheck"
    controls = [re.search(r"--control (\w+)$", call) for call in calls]
    assert [found and found[1] for found in controls] == [
        *("memcheck", None, None, None, "initcheck", None)
    ]


@pytest.mark.parametrize("tool", list(sanitizer.TOOLS))
def test_an_error_in_a_tool_fails_the_run(
    fake: Path,
    tool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_FAILS", tool)
    assert sanitizer.main(tmp_path / "logs", "cuda") == 1
    *tools, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in tools if line.split()[1] == "FAILED"] == [tool]
    assert last.startswith("sanitizer: FAILED")


@pytest.mark.usefixtures("fake")
def test_a_tool_without_a_summary_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has not looked at anything, as where the script could not start."""
    monkeypatch.setenv("FAKE_SILENT", "--backend triton")
    assert sanitizer.main(tmp_path / "logs", "triton") == 1
    lines = capsys.readouterr().out.splitlines()
    for tool, line in zip(sanitizer.TOOLS, lines, strict=False):
        assert line.startswith(f"{tool:10} FAILED  no summary, exit status 0")


@pytest.mark.usefixtures("fake")
def test_a_filter_that_finds_nothing_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FILTER", "nothing")
    assert sanitizer.main(tmp_path / "logs", "cuda") == 1
    assert capsys.readouterr().out.count("NOT REPORTED (0 errors, exit status 0)") == 2


def test_whose_kernel_read_what_was_not_written() -> None:
    report = (
        "========= Uninitialized __global__ memory read of size 4 bytes\n"
        "=========     at {}\n=========     Device Frame:{}\n"
        "=========     Host Frame: mmfuse/_C.so\n"
    )
    theirs = report.format("void at::native::vectorized_elementwise_kernel<4>()+0x10", "")
    older = report.format("0x150 in void mmfuse::cuda::range_kernel<float>(int)", "")
    inlined = report.format("__half2float(__half)", "void mmfuse::cuda::range_kernel<__half>(int)")
    triton = report.format("_update_grads_kernel+0x20 in update_grads.py:60", "")
    log = theirs + older + inlined + triton
    assert sanitizer.reads_of_ours(log, "cuda") is None
    log += "========= ERROR SUMMARY: 4 errors\n"
    assert sanitizer.reads_of_ours(log, "cuda") == 2
    assert sanitizer.reads_of_ours(log, "triton") == 1
    assert sanitizer.errors_in(log) == 4


def test_without_compute_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitizer.main(tmp_path / "logs", "cuda") == 2
    assert "neither on PATH nor in" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
