"""A library that was built from other sources than those of the checkout is not used."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from installs import ROOT, run

from build_tools.finding import find_ninja
from build_tools.sources import CSRC, library_digest
from mmfuse import _native

BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
ASK = [sys.executable, "-c", "import mmfuse; print(mmfuse._native.why_missing('cpu'))"]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("changed", "libraries"),
    [
        ("cpu/scale_grad.cpp", {"cpu"}),
        ("cpu/simd/vec.h", {"cpu"}),
        ("cuda/scale_grad_kernel.cu", {"cuda"}),
        ("facts/cuda.cpp", {"cuda"}),
        ("common/philox.h", {"cpu", "cuda"}),
        ("glue/table.h", {"cpu", "cuda"}),
        ("facts/module.cpp", set()),
    ],
)
def test_only_its_own_sources_count(changed: str, libraries: set[str], tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    before = {library: library_digest(library, copy) for library in ("cpu", "cuda")}
    assert before == {library: library_digest(library) for library in before}, "wherever they lie"
    append(copy / changed, "// one more line\n")
    assert {n for n, old in before.items() if library_digest(n, copy) != old} == libraries


def test_a_library_of_other_sources_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("csrc", "build_tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(_native, "_FOLDER", tmp_path / "mmfuse")
    monkeypatch.setattr(_native, "_loaded", {"cpu": {"sources": library_digest("cpu")}, "cuda": {}})
    assert _native._why_stale("cpu") is None
    append(tmp_path / "csrc" / "cpu" / "scale_grad.cpp", "// one more line\n")
    reason = _native._why_stale("cpu") or ""
    assert reason.startswith("it was built from other sources") and "pip install -e ." in reason
    assert _native._why_stale("cuda") is None, "it says nothing of its sources"
    shutil.rmtree(tmp_path / "csrc")  # an installed package has none
    assert _native._why_stale("cpu") is None
    shutil.rmtree(tmp_path / "build_tools")
    assert _native._why_stale("cpu") is None


@pytest.mark.slow
@pytest.mark.skipif(find_ninja() is None, reason="needs ninja")
def test_an_update_that_was_not_built_again(small: Path) -> None:
    def asked() -> str:
        done = run(ASK, small, PYTHONPATH=str(small))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build() -> None:
        done = run(BUILD, small, MMFUSE_NATIVE="1", MMFUSE_CUDA="0")
        assert done.returncode == 0, done.stderr

    build()
    assert asked() == "None"
    append(small / "csrc" / "cpu" / "simd" / "simd.h", "// one more line\n")
    assert asked() == (
        "libmmfuse_cpu.so could not be loaded: it was built from other sources than those in "
        f"{small / 'csrc'}: run `pip install -e .` (or `make build`) there again"
    )
    build()
    assert asked() == "None"
