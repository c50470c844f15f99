"""Backends under test, the device each runs on, and poisoned outputs.

Without a GPU all four backends run on the CPU: Triton in its interpreter, the CUDA kernels compiled
against the host shim of tests/kernels/cuda_on_cpu. With one, the tests marked `gpu` run there too.
MMFUSE_REQUIRE_BACKENDS (a comma-separated list, set by `make test`; `cuda@gpu` is on a GPU) turns a
missing backend from a skip into a failure.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
# Poisoned outputs take deterministic algorithms, and with these cuBLAS wants a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from cells import CELLS, Cell
from cuda_on_cpu.build import build_kernels
from gpu_session import replace_worker_with_a_lost_device, turn
from ranks import close_all

import mmfuse
from mmfuse import _native
from mmfuse.methods.catalogue import METHODS
from mmfuse.ops._registry import OPS

# A developer's every run looks at new examples; CI looks at the same ones each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

REQUIRED = set(filter(None, os.environ.get("MMFUSE_REQUIRE_BACKENDS", "").split(",")))

NO_GPU = "GPU tests are left out: no NVIDIA GPU here. `make gpu OUT=folder` runs them where one is."


def pytest_configure(config: pytest.Config) -> None:
    # Needed also beside the library for a GPU, which has nothing for tensors on the CPU.
    if not torch.cuda.is_available() and OPS["grad_stats"].why_missing("cuda", "cpu") is not None:
        try:
            _native.load_library(build_kernels(), "cuda")
        except RuntimeError as error:
            if "cuda" in REQUIRED:
                raise pytest.UsageError(f"the CUDA host shim does not build: {error}") from error


def pytest_unconfigure() -> None:
    close_all()


def pytest_runtest_logstart(nodeid: str) -> None:
    replace_worker_with_a_lost_device(nodeid)


# The tests that compare each op with the reference.
_OPS = Path(__file__).parent / "ops"
# A method's name within a test's, as one of its parameters: "ogm_ge_training", "2-OGM-GE".
_METHOD = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(METHODS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


def _is_slow(item: pytest.Item) -> bool:
    """True for a test on the CPU that `make check` runs because of its backend or its method.

    Methods do the same on each backend once its ops are as the reference: above the ops `make
    test` has the reference and the C++ kernels alone. Triton's interpreter is slow: of it `make
    test` has each op's parity in float32, from which other dtypes differ by casts.
    Benchmarks and examples, which no user imports, are for `make check`.
    `slow_except_on` says the like for a single test, and `slow_except_for` names the methods that
    stand for all others there.
    """
    if item.path.parent.name in ("benchmarks", "examples"):
        return True
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    found = _METHOD.search(item.callspec.id) if parameters else None
    for mark in item.iter_markers("slow_except_for"):
        if found is not None and found.group(1).upper() not in mark.args:
            return True
    cell = parameters.get("cell")
    if not isinstance(cell, Cell) or cell.device != "cpu":
        return False
    if _OPS not in item.path.parents:
        if cell.backend in ("triton", "cuda") and item.path.name != "test_noise.py":
            return True
    elif cell.slow:
        dtypes = {value for value in parameters.values() if isinstance(value, torch.dtype)}
        if "parity" not in item.name or dtypes - {torch.float32}:
            return True
    return any(cell.backend not in mark.args for mark in item.iter_markers("slow_except_on"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        items.sort(key=turn)
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line(NO_GPU)


def _require(cell: Cell) -> None:
    for op in OPS.values():
        reason = op.why_missing(cell.backend, cell.device)
        if reason is None:
            continue
        message = f"{cell.backend} on {cell.device}: {reason}"
        if (cell.backend if cell.device == "cpu" else f"{cell.backend}@gpu") in REQUIRED:
            pytest.fail(message)
        if cell.device == "cpu" and cell.backend == "cuda" and torch.cuda.is_available():
            message = "the CUDA kernels run on the GPU here, not in the host shim"
        pytest.skip(message)


@pytest.fixture(
    params=[
        pytest.param(
            cell,
            id=f"{cell.backend}-{cell.device}",
            marks=[pytest.mark.gpu] if cell.device == "cuda" else [],
        )
        for cell in CELLS
    ]
)
def cell(request: pytest.FixtureRequest) -> Cell:
    """Every backend, on every device where it runs."""
    _require(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """Each test has its own inputs; the node's name is the seed, so that a failure repeats."""
    torch.manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture
def poisoned() -> object:
    """Fills every torch.empty with NaN or the largest integer, and new results of the C++ kernels.

    Those do not go through PyTorch's dispatcher, so that their library is asked as well.
    """
    before = torch.are_deterministic_algorithms_enabled()
    path = Path(mmfuse.__file__).parent / "libmmfuse_cpu.so"
    library = ctypes.CDLL(str(path)) if path.exists() else None
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if library is not None:
        library.mmfuse_cpu_poison(1)
    yield
    torch.use_deterministic_algorithms(before)
    if library is not None:
        library.mmfuse_cpu_poison(0)


@pytest.fixture(autouse=True)
def _backend_restored() -> object:
    yield
    mmfuse.use_backend(None)
