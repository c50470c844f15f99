"""Wheels: for every Python 3, and for Linux machines that are older than this one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from installs import ROOT, run

from build_tools import pythons
from build_tools.finding import BuildError, is_portable
from build_tools.sources import digest

# This takes newer symbols from glibc and libstdc++, unless it is told not to.
NEWER = """
#include <cmath>
#include <memory>
#include <sstream>
#include <vector>
std::shared_ptr<std::vector<double>> kept;
__attribute__((visibility("default"))) double newer(double x, std::size_t n) {
  kept = std::make_shared<std::vector<double>>(n, x);
  std::ostringstream out;
  std::stringstream both;
  out << x;
  both << out.str();
  both >> x;
  return std::exp(x) + std::log(x) + std::pow(x, kept->back());
}
"""
# Like the real one it has exceptions, and memory of a number of elements.
MODULE = """
#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <vector>

struct Counted : std::runtime_error {
  using std::runtime_error::runtime_error;
  Counted(const Counted& other) : std::runtime_error(other) {}
  ~Counted() override { ++ended; }
  static int ended;
};
int Counted::ended = 0;

// An exception that is kept twice ends once, with the last of the two.
int kept_twice(int n) {
  std::vector<std::exception_ptr> kept(n);
  kept[0] = std::make_exception_ptr(Counted("kept"));
  Counted::ended = 0;
  kept[1] = kept[0];
  kept[0] = nullptr;
  const int early = Counted::ended;
  kept.clear();
  return 10 * early + Counted::ended;
}

PYBIND11_MODULE(_C, m) {
  m.def("kept_twice", &kept_twice);
  m.def("fail", [] { throw std::runtime_error("said"); });
}
"""


def wheel_of(tree: Path, **variables: str) -> Path:
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    done = run(command, tree, **{"MMFUSE_CUDA": "0", **variables})
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def text_of(wheel: Path, pattern: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
        return archive.read(name).decode()


@pytest.mark.slow
def test_a_wheel_is_for_every_python(small: Path, tmp_path: Path) -> None:
    """One wheel has the module for two of them; another is this one, whose tag says so."""
    other = tmp_path / "python of others"
    answer = json.dumps([".cpython-399-x86_64-linux-gnu.so", sysconfig.get_path("include")])
    other.write_text(f"#!/bin/sh\necho '{answer}'\n")
    other.chmod(0o755)
    # A library of an earlier build, for others.
    stale = small / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (stale / "mmfuse").mkdir(parents=True)
    (stale / "mmfuse" / "_C.cpython-398-x86_64-linux-gnu.so").touch()
    wheel = wheel_of(small, MMFUSE_PYTHONS=shlex.join([sys.executable, str(other)]))
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert "Root-Is-Purelib: false" in text_of(wheel, r".*\.dist-info/WHEEL")
    notes = json.loads(text_of(wheel, r"mmfuse/_build\.json"))
    assert wheel.name.split("-")[1] == notes["version"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            assert str(small).encode() not in archive.read(name), name
    assert "mmfuse/libmmfuse_cpu.so" in names
    own = f"mmfuse/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    modules = sorted(name for name in names if name.startswith("mmfuse/_C."))
    assert modules == sorted([own, "mmfuse/_C.cpython-399-x86_64-linux-gnu.so"])


def test_without_kernels_a_wheel_is_for_every_machine(small: Path) -> None:
    wheel = wheel_of(small, MMFUSE_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in text_of(wheel, r".*\.dist-info/WHEEL")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    notes = json.loads(text_of(wheel, r"mmfuse/_build\.json"))
    assert set(notes["missing"]) == {"cpu", "cuda"}
    # The same sources as those that the benchmark looks at.
    assert notes["sources"] == digest(small / "csrc")


def versions(path: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of glibc, and so on, that a library needs."""
    done = subprocess.run(["nm", "-D", "-u", path], capture_output=True, text=True, check=True)
    found: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", done.stdout):
        numbers = tuple(int(part) for part in version.split("."))
        found[name] = max(found.get(name, ()), numbers)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="these are symbols of glibc")
def test_a_portable_wheel_needs_no_newer_glibc_than_pytorch(small: Path) -> None:
    """The bounds are those of manylinux_2_28, which PyTorch's own wheels have."""
    (small / "csrc" / "cpu" / "newer.cpp").write_text(NEWER)
    (small / "csrc" / "facts" / "module.cpp").write_text(MODULE)
    bounds = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    with zipfile.ZipFile(wheel_of(small, MMFUSE_PORTABLE="1")) as archive:
        archive.extractall(small / "unpacked")
    folder = small / "unpacked" / "mmfuse"
    needed = [of for path in folder.glob("*.so") for of in versions(path).items()]
    assert {name for name, _ in needed} == set(bounds)
    assert all(version <= bounds[name] for name, version in needed), needed
    script = "import _C; print(_C.kept_twice(2)); _C.fail()"
    done = run([sys.executable, "-c", script], small, PYTHONPATH=str(folder))
    assert done.stdout == "1\n", done.stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: said"


def test_a_program_that_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/nowhere/python", "true"):
        monkeypatch.setenv("MMFUSE_PYTHONS", program)
        with pytest.raises(BuildError, match=f"MMFUSE_PYTHONS names {program}, which does not"):
            pythons.interpreters()


def test_portable_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, portable in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("MMFUSE_PORTABLE", value)
        assert is_portable() is portable
    monkeypatch.setenv("MMFUSE_PORTABLE", "yes")
    with pytest.raises(BuildError, match=r"MMFUSE_PORTABLE must be 0 or 1, got 'yes'\."):
        is_portable()


def test_another_processor_is_in_the_name_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = ".cpython-312-x86_64-linux-gnu.so"
    monkeypatch.delenv("_PYTHON_HOST_PLATFORM", raising=False)
    assert pythons.for_target(suffix) == suffix
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    assert pythons.for_target(suffix) == ".cpython-312-aarch64-linux-gnu.so"


def test_nothing_asks_an_index_for_mmfuse() -> None:
    """No index has it: pip would fetch somebody else's package of that name."""
    seen = 0
    for pattern in ("*.md", "mmfuse/**/*.py", "docs/*.md", "examples/*.py", ".ci/*.py"):
        for path in ROOT.glob(pattern):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\binstall (-\S+ )*[\"']?mmfuse\b(?!\.)", text), path
            seen += "pip install" in text
    assert seen > 5
