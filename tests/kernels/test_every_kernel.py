"""every_kernel.py leaves no kernel out, and finds differences from the reference."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import comparing
import every_kernel
import pytest
import torch
from cuda_on_cpu.launches import (
    SOURCES,
    Shim,
    counted_launches,
    declared,
    kernels_shim,
    short_name,
)
from every_kernel import not_written, run
from processes import cuda_tool
from samples import CASES
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.slow
def test_every_cuda_kernel_is_launched(
    shim: Shim, reached: tuple[Counter[str], dict[str, list[Tensor]]]
) -> None:
    launches, written = reached
    assert sorted(set(shim.kernels().values()) - set(launches)) == []
    assert [name for name, tensors in written.items() if not_written(tensors)] == []
    # Under a sanitizer each launch takes long.
    assert launches.total() < 1500
    # These kernels have to ask for their shared memory, see csrc/cuda/device/launch.h.
    most = shim.most_shared()
    large = {name.split("<")[0] for name, shared in most.items() if shared > 48 * 1024}
    assert large == {"joint_histogram_kernel", "soft_histogram_kernel"}


def test_the_shim_has_every_kernel_of_the_sources(shim: Shim) -> None:
    assert {name.split("<")[0] for name in shim.kernels().values()} == set(
        declared(SOURCES, "__global__")
    )


@pytest.mark.slow
def test_the_shim_has_every_kernel_that_nvcc_compiles(shim: Shim, tmp_path: Path) -> None:
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")

    # Only the names matter: without its optimiser, the compiler takes a quarter of the time.
    options = ["-std=c++17", "-arch=compute_80", "-Xcicc", "-O0", "-ptx"]
    options += [f"-I{ROOT / 'csrc'}"]

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


@pytest.mark.slow
@pytest.mark.parametrize(("order", "seed", "byte"), [("reverse", 0, 0xFF), ("random", 1, 0x5A)])
def test_no_result_depends_on_which_thread_goes_first(
    shim: Shim,
    reached: tuple[Counter[str], dict[str, list[Tensor]]],
    order: str,
    seed: int,
    byte: int,
) -> None:
    """Memory that no block or thread has written decides nothing either: it is NaN here.

    The other byte makes a large number, which a comparison does not pass over.
    """
    names = declared(SOURCES, "__shared__")
    assert shim.poison_shared(True, byte) >= len(names)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_as_the_reference(
    reached: tuple[Counter[str], dict[str, list[Tensor]]], name: str
) -> None:
    _, written = reached
    assert comparing.compared(written[name], run("cpu", "reference", [name])[name]) == []


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


@pytest.mark.slow
def test_every_triton_kernel_is_launched_and_keeps_to_its_tensors() -> None:
    """On a GPU `test_on_the_gpu` runs the same cases, which are many kernels to compile."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels run on the GPU here, not in the interpreter")
    from triton_bounds import checked_bounds
    from triton_mutants import comes_to, kernels_accesses, needs_mask

    before = torch.are_deterministic_algorithms_enabled()
    every_kernel.poison()
    try:
        with checked_bounds() as checked:
            written = run("cpu", "triton")
    finally:
        every_kernel.poison(before)
    assert sorted(set(_triton_kernels()) - set(checked.kernels)) == []
    assert all(not not_written(tensors) for tensors in written.values())
    found = list(kernels_accesses())
    assert len(found) > 200
    assert [str(access) for access in found if not comes_to(checked, access)] == []
    masked = [access for access in found if access.masked]
    assert [str(access) for access in masked if not needs_mask(checked, access)] == []
    different = {
        name: lines
        for name, tensors in written.items()
        if (lines := comparing.compared(tensors, run_reference(name)))
    }
    assert different == {}


def run_reference(name: str) -> list[Tensor]:
    """The right results for the interpreter's inputs of a case."""
    return run("cpu", "reference", [name], interpreted=True)[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_the_gpu(backend: str, name: str) -> None:
    assert every_kernel.differences("cuda", backend, name) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_differences_are_found(dtype: torch.dtype) -> None:
    expected = torch.randn(1000, dtype=torch.float64).to(dtype)
    expected[7] = 1.0
    rounded = torch.nextafter(expected.float(), torch.tensor(torch.inf)).to(dtype)
    assert comparing.difference(rounded, expected) is None
    for wrong in (torch.nan, torch.inf, 1.1):
        found = expected.clone()
        found[7] = wrong
        text = comparing.difference(found, expected)
        assert text.startswith("1 of 1000 differ; [7] is ") and text.endswith(" instead of 1")
    assert "differ" in comparing.difference(expected.roll(1), expected)


def test_other_shapes_dtypes_and_counts_differ() -> None:
    ones = torch.ones(3)
    assert "instead of torch.float32 [3]" in comparing.difference(torch.ones(3, 1), ones)
    assert "is torch.float64 [3]" in comparing.difference(ones.double(), ones)
    assert comparing.compared([ones], [ones, ones]) == ["1 outputs instead of 2"]
    counts = torch.tensor([1, 2, 3])
    assert comparing.difference(counts + torch.tensor([0, 0, 1]), counts) == "1 of 3 differ"
    assert comparing.difference(counts.clone(), counts) is None


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


def test_the_script_compares(
    shim: Shim, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--device", "cpu", "--case", "discrepancy_ratios", "--compare"]
    assert every_kernel.main(arguments) == 0
    assert "discrepancy_ratios: as the reference" in capsys.readouterr().out
    kinds = {"reference": 1.0, "cuda": 2.0}
    wrong = lambda inputs: [torch.full((2,), kinds[inputs.backend])]  # noqa: E731
    monkeypatch.setitem(CASES, "discrepancy_ratios", wrong)
    assert every_kernel.main(arguments) == 1
    line = "discrepancy_ratios: output 0: 2 of 2 differ; [0] is 2 instead of 1"
    assert line in capsys.readouterr().out
