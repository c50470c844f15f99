"""A build finds PyTorch, compilers, nvcc and its architectures, and ninja; or it says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tools import finding
from build_tools.cuda import architectures, gencode_flags, wants_cuda
from build_tools.finding import (
    find_compiler,
    find_ninja,
    find_torch,
    jobs,
    mode,
    torch_version,
    why_broken,
)


def test_whether_cuda_is_built(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    version = tmp_path / "version.py"
    version.write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    for name in ("MMFUSE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    assert wants_cuda(tmp_path, fake_nvcc("13.2")) == (True, "")
    wanted, reason = wants_cuda(tmp_path, None)
    assert not wanted and "nvcc was not found" in reason
    version.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.0'\n")
    wanted, reason = wants_cuda(tmp_path, fake_nvcc())
    assert not wanted and "CPU build" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "0")
    assert "MMFUSE_CUDA=0" in wants_cuda(tmp_path, fake_nvcc())[1]
    monkeypatch.setenv("MMFUSE_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        wants_cuda(tmp_path, None)


def test_another_major_version_of_cuda(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.11.0'\ncuda = '13.0'\n")
    monkeypatch.delenv("MMFUSE_CUDA", raising=False)
    wanted, reason = wants_cuda(tmp_path, fake_nvcc("12.8"))
    assert not wanted
    assert "nvcc at build time was of CUDA 12.8 and PyTorch of CUDA 13.0" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"MMFUSE_CUDA=1, but nvcc .* CUDA 12\.8 and PyTorch"):
        wants_cuda(tmp_path, fake_nvcc("12.8"))


def test_architectures_become_flags() -> None:
    assert gencode_flags("8.0;9.0+PTX") == [
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
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    for unset in (None, "", " "):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if unset is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", unset)
        assert architectures(fake_nvcc(archs=known)) == archs


def test_architectures_of_the_user(
    monkeypatch: pytest.MonkeyPatch, fake_nvcc: Callable[..., str]
) -> None:
    nvcc = fake_nvcc(archs="100 75 80 90")
    for listed, archs in [
        ("8.0;9.0+PTX", "8.0;9.0+PTX"),
        ("7.5 9.0a", "7.5;9.0a"),
        ("9.0a+PTX;10.0f", "9.0a+PTX;10.0f"),
    ]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert architectures(nvcc) == archs
    for listed, culprit in [("9.0;12.0+PTX", r"12\.0\+PTX"), ("Hopper", "Hopper")]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        knows = r"it knows 7\.5, 8\.0, 9\.0, 10\.0"
        with pytest.raises(SystemExit, match=rf"names {culprit}, which .* not know; {knows}"):
            architectures(nvcc)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(SystemExit, match=r"knows none of 8\.0, 9\.0, 10\.0"):
        architectures(fake_nvcc(archs="50 70"))


def test_an_unknown_architecture_is_a_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_nvcc: Callable[..., str],
) -> None:
    """It leaves the cpu backend as it is, like all reasons against CUDA."""
    (tmp_path / "version.py").write_text("cuda = '13.0'\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    monkeypatch.delenv("MMFUSE_CUDA", raising=False)
    wanted, reason = wants_cuda(tmp_path, fake_nvcc())
    assert not wanted and "TORCH_CUDA_ARCH_LIST names 7.0" in reason
    monkeypatch.setenv("MMFUSE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"MMFUSE_CUDA=1, but TORCH_CUDA_ARCH_LIST names 7\.0"):
        wants_cuda(tmp_path, fake_nvcc())


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match=r"MAX_JOBS must be a number of .* got 'all'"):
        jobs()
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= jobs() <= (os.cpu_count() or 1)


def test_settings_are_auto_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, meant in (("", "auto"), ("auto", "auto"), ("0", "0"), ("1", "1")):
        monkeypatch.setenv("MMFUSE_NATIVE", value)
        assert mode("MMFUSE_NATIVE") == meant
    monkeypatch.setenv("MMFUSE_NATIVE", "no")
    with pytest.raises(SystemExit, match="MMFUSE_NATIVE must be auto, 0 or 1, got 'no'"):
        mode("MMFUSE_NATIVE")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_compilers_that_are_not_there_and_that_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get errors of their own, and a compiler that the user names is never ignored."""
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="there is no program 'no-such-compiler'; set CXX to"):
        find_compiler()
    monkeypatch.setenv("CXX", "g++ 'half")
    with pytest.raises(SystemExit, match="CXX cannot be read"):
        find_compiler()
    broken = program(tmp_path / "my compilers" / "false", "exit 1")
    monkeypatch.setenv("CXX", str(broken))
    assert find_compiler() == [str(broken)]
    with pytest.raises(SystemExit, match=r"cannot compile a program .* it ended with 1; set CXX"):
        why_broken([str(broken)])
    monkeypatch.delenv("CXX")
    assert "it ended with 1" in str(why_broken([str(broken)]))
    program(tmp_path / "bin" / "g++", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_compiler() == ["g++"]
    assert why_broken(["g++"]) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None


def test_flags_that_no_compiler_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    assert compiler is not None
    assert why_broken(compiler) is None
    monkeypatch.setenv("CXXFLAGS", "-fno-such-thing")
    with pytest.raises(SystemExit, match=r"CXXFLAGS=-fno-such-thing, with which .* error"):
        why_broken(compiler)


def pytorch(folder: Path, version: str) -> Path:
    header = folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    return folder / "torch"


def test_a_pytorch_that_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    pytorch(old, "2.10.1")
    monkeypatch.setattr(finding, "site_folders", lambda: [old, new])
    with pytest.raises(SystemExit) as error:
        find_torch()
    assert f"(looked in {old}, which has 2.10.1; {new}); install torch first" in str(error.value)
    made = pytorch(new, "2.11.0a0+git")
    assert find_torch() == made
    assert torch_version(made) == "2.11.0a0+git"


@pytest.mark.parametrize("shared", [True, False])
def test_an_environment_that_sees_the_systems_packages(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's PyTorch, which a build in isolation does not have on its path."""
    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {shared}\n".lower())
    system = str(tmp_path / "system")
    monkeypatch.setattr(finding.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(finding.site, "getsitepackages", lambda prefixes: [system])
    assert (Path(system) in finding.site_folders()) == shared


def test_a_ninja_that_cannot_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = program(tmp_path / "first" / "ninja", "echo no module; exit 1")
    monkeypatch.setattr(finding.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finding.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setattr(finding.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(broken.parent))
    assert find_ninja() is None
    works = program(tmp_path / "scripts" / "ninja", "echo 1.13.0")
    assert find_ninja() == str(works)
