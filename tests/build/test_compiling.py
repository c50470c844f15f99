"""Ninja compiles the files that changed, for every front end and wherever the checkout lies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from installs import ROOT, run

from build_tools.compiling import alone, escaped
from build_tools.finding import find_ninja

COMMAND = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


def compiled(checkout: Path, **env: str) -> list[str]:
    """Builds, and returns the sources that were compiled."""
    done = run(COMMAND, checkout, MMFUSE_NATIVE="1", MMFUSE_CUDA="0", **env)
    assert done.returncode == 0, done.stderr
    return sorted(re.findall(r"^\[\d+/\d+\] cpu: (\w+\.cpp)$", done.stderr, re.M))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.slow
@pytest.mark.skipif(find_ninja() is None, reason="needs ninja")
def test_only_what_has_changed_is_compiled(small: Path, tmp_path: Path) -> None:
    # This path has to survive ninja's file, the shell, and the compiler's list of headers.
    checkout = small.rename(tmp_path / "mit Gr\u00fc\u00dfen $HOME: #1")
    library = checkout / "mmfuse" / "libmmfuse_cpu.so"
    assert compiled(checkout) == ["cpu.cpp", "simd.cpp"]
    made = library.stat().st_mtime_ns
    assert compiled(checkout) == []
    assert library.stat().st_mtime_ns == made
    append(checkout / "csrc" / "facts" / "cpu.cpp", "// one more line\n")
    assert compiled(checkout) == ["cpu.cpp"]
    append(checkout / "csrc" / "cpu" / "simd" / "simd.h", "// one more line\n")
    assert compiled(checkout) == ["cpu.cpp", "simd.cpp"]
    assert compiled(checkout, CXXFLAGS="-DMORE") == ["cpu.cpp", "simd.cpp"]
    # Another compiler in the place of this one.
    append(checkout / "build" / "native" / "tools.txt", "another\n")
    assert compiled(checkout, CXXFLAGS="-DMORE") == ["cpu.cpp", "simd.cpp"]
    library.unlink()
    assert compiled(checkout, CXXFLAGS="-DMORE") == []
    assert library.is_file()


@pytest.mark.slow
def test_an_editable_install_again_compiles_nothing(small: Path, tmp_path: Path) -> None:
    """Setuptools makes a new folder for each install; the objects are kept nonetheless."""
    words = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-v",
        "--target",
        tmp_path / "there",
    ]
    command = [sys.executable, "-m", "pip", "install", *words, "--editable", "."]
    first, again = (run(command, small, MMFUSE_CUDA="0") for _ in range(2))
    assert first.returncode == 0, first.stderr
    # Pip shows on stderr what its processes print.
    assert "cpu: simd.cpp" in first.stderr
    assert again.returncode == 0, again.stderr
    assert "ninja: no work to do" in again.stderr and "cpu: simd.cpp" not in again.stderr


def test_another_build_of_the_folder_is_waited_for(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from build_tools.compiling import alone\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with alone(folder): (folder / 'second').touch()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with alone(tmp_path):
        other = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        line = other.stderr.readline()
        assert line == f"mmfuse: another build uses {tmp_path}; waiting for it\n"
        assert not (tmp_path / "second").exists()
    assert other.communicate(timeout=60) == (None, "")
    assert (tmp_path / "second").exists()


def test_paths_as_ninja_reads_them() -> None:
    assert escaped(Path("/a b/c:$d")) == "/a$ b/c$:$$d"
