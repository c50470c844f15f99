"""Installing: with and without PyTorch, a compiler, nvcc; one sentence when it cannot work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

import mmfuse
from mmfuse import _native

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmfuse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
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


@pytest.mark.slow
def test_a_wheel_holds_the_libraries(small: Path) -> None:
    done = run([sys.executable, "setup.py", "-q", "bdist_wheel"], small, MMFUSE_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (small / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mmfuse/libmmfuse_cpu.so", "mmfuse/_build.json"} <= set(names)
    assert sum(name.startswith("mmfuse/_C.") for name in names) == 1


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_no_library_needs_python(backend: str) -> None:
    """So that one built for another version of Python, or elsewhere, loads here."""
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
    # As a copy from another machine: no _C and no _build.json beside it.
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


def test_a_compiler_error_is_shown(small: Path) -> None:
    (small / "csrc" / "cpu" / "simd" / "simd.cpp").write_text("this is not C++\n")
    done = run([sys.executable, "setup.py", "build"], small, MMFUSE_CUDA="0")
    assert done.returncode != 0
    assert "this command failed" in done.stderr
    assert "not C++" in done.stderr or "error:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_build_without_pythons_headers_costs_the_facts_only(small: Path) -> None:
    (small / "csrc" / "facts" / "module.cpp").write_text('#include "Python_is_not_here.h"\n')
    library = installed_without(small, MMFUSE_CUDA="0")
    assert not list(library.glob("mmfuse/_C*"))
    text = report(library)
    assert "has_cpu              True" in text
    assert "compiler             unknown: it did not build: " in text
    assert "Python_is_not_here.h" in text


def bare_python(tmp_path: Path) -> tuple[Path, str]:
    """A virtual environment with setuptools and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    home = Path(setuptools.__file__).parent
    for part in (*home.parent.glob("setuptools*"), home.parent / "_distutils_hack"):
        (packages / part.name).symlink_to(part)
    return tmp_path / "bare" / "bin" / "python", str(packages)


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
    assert json.loads((library / "mmfuse" / "_build.json").read_text()) == {"cuda": reason}
    text = report(library)
    assert f"cuda: {reason}" in text
    assert "has_cpu              True" in text


def test_kernels_that_do_not_build_are_an_error_where_they_are_demanded(
    small: Path, build_for_cuda: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = build_for_cuda("1")
    assert done.returncode != 0
    assert "this command failed" in done.stderr
    assert "kernel.cu(7): error: no such thing" in done.stderr
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
    build_script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    version = tmp_path / "version.py"
    version.write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    for name in ("MMFUSE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    assert build_script.wants_cuda(tmp_path, fake_nvcc("13.2")) == (True, "")
    wanted, reason = build_script.wants_cuda(tmp_path, None)
    assert not wanted and "nvcc was not found" in reason
    version.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.0'\n")
    wanted, reason = build_script.wants_cuda(tmp_path, fake_nvcc())
    assert not wanted and "CPU build" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "0")
    assert "MMFUSE_CUDA=0" in build_script.wants_cuda(tmp_path, fake_nvcc())[1]
    monkeypatch.setenv("MMFUSE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build_script.wants_cuda(tmp_path, None)


def test_another_major_version_of_cuda(
    build_script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\ncuda = '13.0'\n")
    monkeypatch.delenv("MMFUSE_CUDA", raising=False)
    wanted, reason = build_script.wants_cuda(tmp_path, fake_nvcc("12.8"))
    assert not wanted
    assert "nvcc at build time was of CUDA 12.8 and PyTorch of CUDA 13.0" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"MMFUSE_CUDA=1, but nvcc .* CUDA 12\.8 and PyTorch"):
        build_script.wants_cuda(tmp_path, fake_nvcc("12.8"))


def test_architectures_become_flags(build_script: ModuleType) -> None:
    assert build_script.gencode_flags("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        ("75 80 90 100 120", "8.0;9.0;10.0+PTX"),
        ("50 75 80 86 89 90", "8.0;9.0+PTX"),
        ("50 70 80", "8.0+PTX"),
    ],
)
def test_only_default_architectures_that_nvcc_knows(
    known: str,
    archs: str,
    build_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    for unset in (None, "", " "):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if unset is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", unset)
        assert build_script.architectures(fake_nvcc(archs=known)) == archs


def test_architectures_of_the_user(
    build_script: ModuleType, monkeypatch: pytest.MonkeyPatch, fake_nvcc: Callable[..., str]
) -> None:
    nvcc = fake_nvcc(archs="100 75 80 90")
    for listed, archs in [
        ("8.0;9.0+PTX", "8.0;9.0+PTX"),
        ("7.5 9.0a", "7.5;9.0a"),
        ("9.0a+PTX;10.0f", "9.0a+PTX;10.0f"),
    ]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert build_script.architectures(nvcc) == archs
    for listed, culprit in [("9.0;12.0+PTX", r"12\.0\+PTX"), ("Hopper", "Hopper")]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        knows = r"it knows 7\.5, 8\.0, 9\.0, 10\.0"
        with pytest.raises(SystemExit, match=rf"names {culprit}, which .* not know; {knows}"):
            build_script.architectures(nvcc)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(SystemExit, match=r"knows none of 8\.0, 9\.0, 10\.0"):
        build_script.architectures(fake_nvcc(archs="50 70"))


def test_an_unknown_architecture_is_a_reason(
    build_script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    """It leaves the cpu backend as it is, like all that keeps CUDA from being built."""
    (tmp_path / "version.py").write_text("cuda = '13.0'\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    monkeypatch.delenv("MMFUSE_CUDA", raising=False)
    wanted, reason = build_script.wants_cuda(tmp_path, fake_nvcc())
    assert not wanted and "TORCH_CUDA_ARCH_LIST names 7.0" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"MMFUSE_CUDA=1, but TORCH_CUDA_ARCH_LIST names 7\.0"):
        build_script.wants_cuda(tmp_path, fake_nvcc())


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
