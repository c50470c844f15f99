"""The order of the tests on a GPU; a worker that has lost its device is replaced."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_session
import pytest
import torch
from cells import Cell

CONFTEST = """
import gpu_session

lost = []
gpu_session.is_lost = lambda: bool(lost)

def pytest_runtest_logstart(nodeid):
    gpu_session.replace_worker_with_a_lost_device(nodeid)
"""
TESTS = """
import conftest, pytest

@pytest.mark.parametrize("n", range(12))
def test_one(n):
    if n == 3:
        conftest.lost.append(n)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.slow
def test_one_bad_kernel_costs_two_tests(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider"]
    paths = f"{tmp_path}:{Path(gpu_session.__file__).parent}"
    done = subprocess.run(
        [*command, "-o", "pythonpath=" + paths.replace(":", " ")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "illegal memory access" in done.stdout
    assert re.search(r"worker 'gw0' crashed while running '.*test_one\[4\]'", done.stdout)
    assert "2 failed, 10 passed" in done.stdout


def test_a_device_that_works_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_session.is_lost()

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert gpu_session.is_lost()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not gpu_session.is_lost()


def test_the_order_on_a_gpu() -> None:
    def item(file: str, *parameters: object) -> object:
        params = {str(i): value for i, value in enumerate(parameters)}
        return SimpleNamespace(path=Path("tests") / file, callspec=SimpleNamespace(params=params))

    first = item("test_gpu.py", "triton", torch.ones(2))
    second = item("test_update_grads.py", Cell("cuda", "cuda"), 7)
    plain = SimpleNamespace(path=Path("tests/test_arm.py"))
    last = [item("test_gpu.py", "reference"), item("test_noise.py", Cell("reference", "cuda"))]
    assert sorted([*last, plain, second, first], key=gpu_session.turn) == [
        first,
        second,
        plain,
        *last,
    ]
