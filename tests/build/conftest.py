"""Checkouts that are copies, and a toolkit that compiles nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from installs import ROOT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that nothing is written into the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in ("mmfuse", "csrc", "build_tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


@pytest.fixture
def small(source: Path) -> Path:
    """The same with one kernel, never compiled, and an empty _C, so that a build takes seconds."""
    for kernels in (source / "csrc" / "cpu", source / "csrc" / "cuda"):
        for file in kernels.rglob("*.*"):
            if file.name not in ("simd.cpp", "simd.h"):
                file.unlink()
    (source / "csrc" / "cuda" / "kernel.cu").touch()
    (source / "csrc" / "facts" / "module.cpp").write_text("")
    return source


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Callable[..., str]:
    """Makes an nvcc that knows these versions and architectures, and compiles nothing."""

    def make(version: str = "13.0", archs: str = "75 80 90 100 120") -> str:
        path = tmp_path / "cuda" / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        # So that the glue compiles, and nothing fails but the kernel.
        header = tmp_path / "cuda" / "include" / "cuda_runtime_api.h"
        header.parent.mkdir(exist_ok=True)
        header.write_text("#define CUDART_VERSION 13000\n")
        path.write_text(
            "#!/bin/sh\n"
            'case "$*" in\n'
            f"  --version) echo 'Cuda compilation tools, release {version}, V{version}.1' ;;\n"
            f"  --list-gpu-arch) printf 'compute_%s\\n' {archs} ;;\n"
            "  *) echo note; echo 'kernel.cu(7): error: no such thing' >&2; exit 1 ;;\n"
            "esac\n"
        )
        path.chmod(0o755)
        return str(path)

    return make
