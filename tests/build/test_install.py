"""Installing: with and without PyTorch, a compiler, nvcc; one sentence when it cannot work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from installs import ROOT, bare_python, run

import mmfuse
from mmfuse import _native


def installed_without(source: Path, **env: str) -> Path:
    """Builds into source/build/lib and returns that folder."""
    done = run([sys.executable, "setup.py", "-q", "build"], source, **env)
    assert done.returncode == 0, done.stderr
    return next((source / "build").glob("lib*"))


def report(library: Path) -> str:
    """The output of `python -m mmfuse`, after one op has run."""
    script = (
        "import warnings, torch, mmfuse; warnings.simplefilter('ignore');"
        "print(mmfuse.__file__);"
        "print(float(mmfuse.ops.grad_stats([torch.tensor([1., 3.])]).mean));"
        "from mmfuse.__main__ import report; print(report())"
    )
    done = run([sys.executable, "-c", script], library, PYTHONPATH=str(library))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(library / "mmfuse" / "__init__.py")
    assert lines[1] == "2.0"
    return done.stdout


@pytest.mark.slow
def test_without_a_compiler_the_install_works(source: Path) -> None:
    library = installed_without(source, PATH=str(Path(sys.executable).parent))
    assert not [*library.glob("mmfuse/_C*"), *library.glob("mmfuse/*.so")]
    assert "no C++ compiler was found at build time" in report(library)


@pytest.mark.slow
def test_native_code_switched_off(source: Path) -> None:
    library = installed_without(source, MMFUSE_NATIVE="0")
    assert "switched off at build time by MMFUSE_NATIVE=0" in report(library)


def test_a_build_leaves_no_library_of_an_earlier_one(source: Path) -> None:
    stale = [source / "mmfuse" / f"libmmfuse_{backend}.so" for backend in ("cpu", "cuda")]
    for path in stale:
        path.touch()
    done = run([sys.executable, "setup.py", "build_ext", "-i"], source, MMFUSE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in stale)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_no_library_needs_python(backend: str) -> None:
    """A library that was built elsewhere, or for another Python, therefore loads here."""
    path = Path(mmfuse.__file__).with_name(f"libmmfuse_{backend}.so")
    if not path.exists():
        pytest.skip(f"{path.name} was not built here")
    done = run(["nm", "-D", "--undefined-only", path], ROOT)
    symbols = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any("aoti_torch" in symbol for symbol in symbols), done.stderr
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["cpu", "cuda"])
def test_a_library_that_does_not_load_costs_its_backend_only(broken: str, source: Path) -> None:
    built = Path(mmfuse.__file__).with_name("libmmfuse_cpu.so")
    if not built.exists():
        pytest.skip(str(_native.why_missing("cpu")))
    # A copy from another machine: no _C and no _build.json beside it.
    shutil.copy(built, source / "mmfuse")
    (source / "mmfuse" / f"libmmfuse_{broken}.so").unlink(missing_ok=True)
    (source / "mmfuse" / f"libmmfuse_{broken}.so").write_text("not a library " * 100)
    script = (
        "import json; from mmfuse import _native;"
        "print(json.dumps([_native.why_missing('cpu'), _native.why_missing('cuda'),"
        " _native.build_info()]))"
    )
    done = run([sys.executable, "-c", script], source, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    *reasons, info = json.loads(done.stdout)
    reason = dict(zip(("cpu", "cuda"), reasons, strict=True))
    assert reason[broken].startswith(f"libmmfuse_{broken}.so could not be loaded: ")
    assert sys.platform != "linux" or "invalid ELF header" in reason[broken]
    if broken == "cuda":
        assert reason["cpu"] is None
        assert info["simd"] in info["simd_built"]
        assert info["has_cpu"] and not info["has_cuda"]
        assert (
            "unknown: mmfuse._C, which knows it and the flags, was not built for this Python"
            in info["compiler"]
        )
    else:
        assert "there is no libmmfuse_cuda.so in" in reason["cuda"]
        assert info is None


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without"])
def test_a_compiler_error_is_shown_with_the_way_out(small: Path, ninja: bool) -> None:
    (small / "csrc" / "cpu" / "simd" / "simd.cpp").write_text("this is not C++\n")
    if not ninja:
        program = small / "build_tools" / "finding.py"
        program.write_text(program.read_text() + "\ndef find_ninja():\n    return None\n")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(command, small, MMFUSE_NATIVE="1")
    assert done.returncode != 0
    assert "FAILED: " in done.stderr and "simd.cpp" in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("mmfuse: the")]
    assert sentence.startswith("mmfuse: the command above failed: ") and "error:" in sentence
    assert sentence.endswith("MMFUSE_NATIVE=1 makes a failure an error.")
    assert "Traceback" not in done.stderr
    assert not (small / "mmfuse" / "_build.json").exists()
    # The kernels were not asked for: the package works without them, and says why.
    done = run(command, small)
    assert done.returncode == 0, done.stderr
    assert "mmfuse: WARNING: without the cpu backend: it did not build: " in done.stderr
    assert "MMFUSE_CUDA=0 leaves the CUDA kernels out" in done.stderr.splitlines()[-1]
    notes = json.loads((small / "mmfuse" / "_build.json").read_text())["missing"]
    assert "error:" in notes["cpu"] and "simd.cpp" in notes["cpu"]
    assert not list((small / "mmfuse").glob("*cpu.so"))


@pytest.mark.slow
def test_a_build_without_pythons_headers_costs_the_facts_only(small: Path) -> None:
    (small / "csrc" / "facts" / "module.cpp").write_text('#include "Python_is_not_here.h"\n')
    library = installed_without(small, MMFUSE_CUDA="0")
    assert not list(library.glob("mmfuse/_C*"))
    text = report(library)
    assert "has_cpu              True" in text
    assert "compiler             unknown: it did not build: " in text
    assert "Python_is_not_here.h" in text


@pytest.fixture
def build_for_cuda(
    small: Path, tmp_path: Path, fake_nvcc: Callable[..., str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Builds beside a PyTorch that says it is of CUDA 13, with an nvcc that fails."""
    python, packages = bare_python(tmp_path)
    fake_torch = Path(packages) / "torch"
    fake_torch.mkdir()
    for part in ("include", "lib"):
        (fake_torch / part).symlink_to(Path(torch.__file__).parent / part)
    (fake_torch / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    home = Path(fake_nvcc()).parents[1]

    def build(mode: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": packages, "CUDA_HOME": str(home), "MMFUSE_CUDA": mode}
        return run([python, "setup.py", "-q", "build"], small, **environment)

    return build


@pytest.mark.slow
def test_kernels_that_do_not_build_leave_the_cpu_backend(
    small: Path, build_for_cuda: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = build_for_cuda("auto")
    assert done.returncode == 0, done.stderr
    reason = "it did not build: kernel.cu(7): error: no such thing"
    assert f"mmfuse: WARNING: without the cuda backend: {reason}" in done.stderr
    library = next((small / "build").glob("lib*"))
    notes = json.loads((library / "mmfuse" / "_build.json").read_text())
    assert notes["missing"] == {"cuda": reason}
    text = report(library)
    assert f"cuda: {reason}" in text
    assert "has_cpu              True" in text


def test_kernels_that_do_not_build_are_an_error_where_they_are_demanded(
    small: Path, build_for_cuda: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = build_for_cuda("1")
    assert done.returncode != 0
    assert "mmfuse: the command above failed: kernel.cu(7): error: no such thing" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_pytorch_metadata_works_and_the_build_says_what_to_do(
    source: Path, tmp_path: Path
) -> None:
    python, packages = bare_python(tmp_path)
    metadata = run([python, "setup.py", "-q", "egg_info"], source, PYTHONPATH=packages)
    assert metadata.returncode == 0, metadata.stderr
    assert "torch>=2.11" in (source / "mmfuse.egg-info" / "requires.txt").read_text()
    build = run([python, "setup.py", "-q", "build"], source, PYTHONPATH=packages)
    assert build.returncode != 0
    assert "PyTorch 2.11 or newer was not found (looked in " in build.stderr
    assert f"{packages}; " in build.stderr and "); install torch first" in build.stderr
    assert "Traceback" not in build.stderr


def test_cuda_demanded_but_impossible(source: Path, tmp_path: Path) -> None:
    """MMFUSE_CUDA=1 fails rather than leaving the kernels out."""
    torch = tmp_path / "torch"
    (torch / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (torch / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    (torch / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    script = (
        "import pathlib, build_tools.cuda as cuda;"
        f"cuda.wants_cuda(pathlib.Path({str(torch)!r}), 'nvcc')"
    )
    done = run([sys.executable, "-c", script], source, MMFUSE_CUDA="1")
    assert done.returncode != 0
    assert "MMFUSE_CUDA=1, but the PyTorch at build time was a CPU build; unset it" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_never_compiles() -> None:
    """No compiler process is started by the import, not even with Triton there."""
    script = (
        "import subprocess, os\n"
        "def refuse(*a, **k): raise RuntimeError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse; os.system = refuse; os.posix_spawn = refuse\n"
        "import mmfuse; print('imported')"
    )
    done = run([sys.executable, "-c", script], ROOT)
    assert done.stdout.strip() == "imported", done.stderr
