"""Installing: with and without PyTorch, a compiler, nvcc; one sentence when it cannot work."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that nothing is written into the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in ("mmfuse", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


@pytest.fixture
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmfuse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: list, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MMFUSE_", "TORCH_CUDA"))}
    return subprocess.run(
        words, cwd=cwd, env=keep | env, capture_output=True, text=True, check=False
    )


def installed_without(source: Path, **env: str) -> Path:
    """Builds into source/build/lib and returns that folder."""
    done = run([sys.executable, "setup.py", "-q", "build"], source, **env)
    assert done.returncode == 0, done.stderr
    return next((source / "build").glob("lib*"))


def report(library: Path) -> str:
    """What `python -m mmfuse` says, after one op has run."""
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


def test_without_a_compiler_the_install_works(source: Path) -> None:
    library = installed_without(source, PATH=str(Path(sys.executable).parent))
    assert not list(library.glob("mmfuse/_C*"))
    assert "no C++ compiler was found at build time" in report(library)


def test_native_code_switched_off(source: Path) -> None:
    library = installed_without(source, MMFUSE_NATIVE="0")
    assert "switched off at build time by MMFUSE_NATIVE=0" in report(library)


def test_a_compiler_error_is_shown(source: Path) -> None:
    (source / "csrc" / "module.cpp").write_text("this is not C++\n")
    for other in (source / "csrc" / "cpu").glob("*.cpp"):
        other.unlink()
    done = run([sys.executable, "setup.py", "build"], source, MMFUSE_CUDA="0")
    assert done.returncode != 0
    assert "this command failed" in done.stderr
    assert "not C++" in done.stderr or "error:" in done.stderr
    assert "Traceback" not in done.stderr


def bare_python(tmp_path: Path) -> tuple[Path, str]:
    """A virtual environment with setuptools and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    home = Path(setuptools.__file__).parent
    for part in (*home.parent.glob("setuptools*"), home.parent / "_distutils_hack"):
        (packages / part.name).symlink_to(part)
    return tmp_path / "bare" / "bin" / "python", str(packages)


def test_without_pytorch_metadata_works_and_the_build_says_what_to_do(
    source: Path, tmp_path: Path
) -> None:
    python, packages = bare_python(tmp_path)
    metadata = run([python, "setup.py", "-q", "egg_info"], source, PYTHONPATH=packages)
    assert metadata.returncode == 0, metadata.stderr
    assert "torch>=2.11" in (source / "mmfuse.egg-info" / "requires.txt").read_text()
    build = run([python, "setup.py", "-q", "build"], source, PYTHONPATH=packages)
    assert build.returncode != 0
    assert "PyTorch 2.11 or newer was not found in this environment; install torch" in build.stderr
    assert "Traceback" not in build.stderr


def test_cuda_demanded_but_impossible(source: Path, tmp_path: Path) -> None:
    """MMFUSE_CUDA=1 fails rather than leaving the kernels out."""
    torch = tmp_path / "torch"
    (torch / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (torch / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    (torch / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    script = f"import setup, pathlib; setup.wants_cuda(pathlib.Path({str(torch)!r}), 'nvcc')"
    done = run([sys.executable, "-c", script], source, MMFUSE_CUDA="1")
    assert done.returncode != 0
    assert "MMFUSE_CUDA=1, but the PyTorch at build time was a CPU build." in done.stderr
    assert "Traceback" not in done.stderr


def test_whether_cuda_is_built(
    build_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version.py"
    version.write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    monkeypatch.delenv("MMFUSE_CUDA", raising=False)
    assert build_script.wants_cuda(tmp_path, "/usr/bin/nvcc") == (True, "")
    wanted, reason = build_script.wants_cuda(tmp_path, None)
    assert not wanted and "nvcc was not found" in reason
    version.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.0'\n")
    wanted, reason = build_script.wants_cuda(tmp_path, "/usr/bin/nvcc")
    assert not wanted and "CPU build" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "0")
    assert "MMFUSE_CUDA=0" in build_script.wants_cuda(tmp_path, "/usr/bin/nvcc")[1]
    monkeypatch.setenv("MMFUSE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build_script.wants_cuda(tmp_path, None)


def test_architectures(build_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    flags, archs = build_script.gencode_flags()
    assert archs == "8.0;9.0+PTX"
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_jobs(build_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build_script.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= build_script.jobs() <= (os.cpu_count() or 1)


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
