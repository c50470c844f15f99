"""Requirements of the build: PyTorch and ninja, only where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from installs import ROOT, run

from build_tools import backend, finding


def nothing_found() -> Path:
    raise finding.BuildError("PyTorch was not found.")


def test_pytorch_and_ninja_are_asked_for_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MMFUSE_NATIVE", "MMFUSE_CUDA", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "find_compiler", lambda: ["c++"])
    monkeypatch.setattr(backend, "find_ninja", lambda: "/usr/bin/ninja")
    monkeypatch.setattr(backend, "find_torch", lambda: Path("torch"))
    assert backend.missing() == []
    monkeypatch.setattr(backend, "find_ninja", lambda: None)
    assert backend.missing() == ["ninja>=1.11"]
    monkeypatch.setattr(backend, "find_torch", nothing_found)
    assert backend.missing() == ["ninja>=1.11", "torch>=2.11"]
    # A build that compiles nothing needs neither.
    monkeypatch.setattr(backend, "find_compiler", lambda: None)
    assert backend.missing() == []
    monkeypatch.setattr(backend, "find_compiler", lambda: ["c++"])
    monkeypatch.setenv("MMFUSE_NATIVE", "0")
    assert backend.missing() == []
    monkeypatch.setenv("MMFUSE_NATIVE", "auto")
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS"):
        backend.missing()


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.os, "access", lambda path, mode: path != ROOT)
    with pytest.raises(SystemExit, match=re.escape(f"writes into {ROOT}, which this user may not")):
        backend.missing()
    # Without isolation these are called at once.
    for build in (backend.build_wheel, backend.build_editable):
        with pytest.raises(SystemExit, match="which this user may not"):
            build("nowhere")


def test_the_oldest_pytorch_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["{backend.TORCH}",' in project
    assert f"torch>={'.'.join(map(str, finding.OLDEST_TORCH))}" == backend.TORCH
    target = re.search(
        r'TORCH_TARGET_VERSION = "0x(\d\w)(\w\w)0', (ROOT / "build_tools/recipe.py").read_text()
    )
    assert target is not None
    assert tuple(int(part, 16) for part in target.groups()) == finding.OLDEST_TORCH


@pytest.mark.slow
@pytest.mark.parametrize("below", [True, False], ids=["below", "none"])
def test_an_environment_without_pytorch_of_its_own(
    below: bool, small: Path, tmp_path: Path
) -> None:
    """In isolation PyTorch lies below the environment, or the build has to bring it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "own"], check=True)
    python = tmp_path / "own" / "bin" / "python"
    if below:
        # A container has it so; this Python is itself in an environment.
        settings = tmp_path / "own" / "pyvenv.cfg"
        text = settings.read_text().replace("packages = false", "packages = true")
        settings.write_text(text)
        hook = small / "build_tools" / "finding.py"
        system = f"site.getsitepackages = lambda prefixes: [{sysconfig.get_path('purelib')!r}]"
        hook.write_text(hook.read_text().replace("COMPILERS =", f"{system}\nCOMPILERS =", 1))
        # Fetching another would fail.
        (tmp_path / "constraints").write_text("torch<2\n")
    else:
        (tmp_path / "constraints").write_text("torch==2.13.0\n")
    done = run(
        [python, "-m", "pip", "install", "-v", "--no-deps", "."],
        small,
        MMFUSE_NATIVE="1",
        MMFUSE_CUDA="0",
        PIP_CONSTRAINT=str(tmp_path / "constraints"),
    )
    assert done.returncode == 0, done.stderr
    # Pip shows on stderr what its processes print.
    assert "cpu: simd.cpp" in done.stderr
    brought = re.search(r"torch(==|-)2\.13\.0", done.stderr)
    assert (brought is None) == below
    (installed,) = (tmp_path / "own").glob("lib/*/site-packages/mmfuse")
    assert (installed / "libmmfuse_cpu.so").is_file()
