"""`make dist` finds what an index, or another machine, would not take in distributions."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from installs import ROOT, run


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))  # as for a script there
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("dist_checks", monkeypatch)


def sdist(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "mmfuse-0.2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"mmfuse-0.2.0/{name}"), io.BytesIO())
    return path


def wheel(tmp_path: Path, tag: str, **files: bytes) -> Path:
    path = tmp_path / f"mmfuse-0.2.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"mmfuse/{name.replace('__', '.')}", data)
    return path


def test_a_source_distribution_is_what_is_tracked(checks: ModuleType, tmp_path: Path) -> None:
    made = ("PKG-INFO", "setup.cfg", "mmfuse.egg-info/SOURCES.txt")
    path = sdist(tmp_path, "setup.py", "tests/a.py", "tests/new.py", *made)
    tracked = ["setup.py", "tests/a.py", "csrc/b.h", ".gitattributes"]
    assert list(checks.of_sdist(path, tracked)) == [
        f"{path.name} lacks .gitattributes",
        f"{path.name} lacks csrc/b.h",
        f"{path.name} has tests/new.py, which is no part of the checkout",
    ]
    assert list(checks.of_sdist(path, ["setup.py", "tests/a.py", "tests/new.py"])) == []
    assert next(iter(checks.of_sdist(path, []))).startswith("there is no repository")


def test_a_wheel_is_for_all_and_holds_no_path(checks: ModuleType, tmp_path: Path) -> None:
    good = wheel(tmp_path, "py3-none-linux_x86_64", a__so=b"csrc/a.cpp", b__py=b"")
    assert list(checks.of_wheel(good, ["/home/me"])) == []
    assert list(checks.of_wheel(wheel(tmp_path, "py3-none-any", b__py=b""), [])) == []
    bad = wheel(tmp_path, "cp312-cp312-linux_x86_64", a__so=b"\x00/home/me/csrc/a.cpp\x00")
    assert list(checks.of_wheel(bad, ["/home/me"])) == [
        f"{bad.name}: mmfuse/a.so holds the path /home/me",
        f"{bad.name} is for cp312-cp312",
    ]
    (fault,) = checks.of_wheel(wheel(tmp_path, "py3-none-any", a__so=b""), [])
    assert fault.endswith("is for any and has mmfuse/a.so")
    (fault,) = checks.of_wheel(wheel(tmp_path, "py3-none-linux_x86_64", b__py=b""), [])
    assert fault.endswith("is for linux_x86_64 and has no library")


@pytest.mark.parametrize(
    ("platform", "fault"),
    [
        ("manylinux_2_28_x86_64", ""),
        ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", ""),
        ("manylinux_2_34_x86_64", "needs a glibc newer than 2.28, which is PyTorch's bound;"),
        ("linux_x86_64", "has no manylinux tag"),
    ],
)
def test_the_platform_is_one_of_pytorchs(
    platform: str, fault: str, checks: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / f"mmfuse-0.2.0-py3-none-{platform}.whl"
    found = list(checks.of_platform(path))
    assert len(found) == bool(fault)
    assert all(sentence.startswith(f"{path.name} {fault}") for sentence in found)


def test_the_programs_findings_are_shown(checks: ModuleType, tmp_path: Path) -> None:
    for name in ("twine", "check-wheel-contents", "validate-pyproject", "pyroma"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$MMFUSE_NATIVE {name} $1"\nexit 1\n')
        program.chmod(0o755)
    found = list(checks.of_programs(Path("a.tar.gz"), [], checks.Tools(tmp_path), ROOT))
    assert found == [
        "twine: 0 twine check",
        "check-wheel-contents: 0 check-wheel-contents",
        f"validate-pyproject: 0 validate-pyproject {ROOT / 'pyproject.toml'}",
        "pyroma: 0 pyroma --min=10",
    ]


def test_wheels_without_a_python_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dist = script("dist", monkeypatch)
    assert dist.main(["--wheels", "--pythons", sys.executable, "python2.0"]) == 2
    expected = "make wheels needs python2.0, which is no Python that starts\n"
    assert capsys.readouterr().err == expected


def test_a_wheel_that_is_there_is_tried_and_nothing_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With each Python, the wheel of this processor alone, and without the package's sources."""
    dist = script("dist", monkeypatch)
    tried: list[tuple[str, str, list[str]]] = []

    def try_with(program: str, wheel: Path, checked: Path) -> None:
        tried.append((program, wheel.name, sorted(path.name for path in checked.iterdir())))

    monkeypatch.setattr(dist, "try_with", try_with)
    monkeypatch.setattr(dist.platform, "machine", lambda: "aarch64")
    output, tree = tmp_path / "dist", tmp_path / "dist_tree" / "mmfuse-0.2.0"
    arguments = ["--built", "--output", str(output), "--pythons", sys.executable]
    assert dist.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"there is no wheel to try in {output}; build it")
    for name in ("mmfuse", "tests"):
        (tree / name).mkdir(parents=True)
    output.mkdir()
    for processor in ("aarch64", "x86_64"):
        (output / f"mmfuse-0.2.0-py3-none-manylinux_2_28_{processor}.whl").touch()
    assert dist.main(arguments) == 0
    wheel = "mmfuse-0.2.0-py3-none-manylinux_2_28_aarch64.whl"
    assert tried == [(sys.executable, wheel, ["tests"])]


@pytest.mark.parametrize("words", [[], ["TRY=1"], ["AARCH64=1"]], ids=str)
def test_make_wheels_builds_unless_it_is_told_to_try(words: list[str]) -> None:
    done = run(["make", "--dry-run", "wheels", *words], ROOT)
    (call,) = re.findall(r"dist\.py (.*)", done.stdout, re.S)
    assert ("--built" in call) == ("TRY=1" in words), done.stderr
    assert ("--wheels" in call) == ("TRY=1" not in words)
    assert ("--aarch64" in call) == ("AARCH64=1" in words)


def test_a_wheel_for_aarch64_needs_its_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cross = script("cross", monkeypatch)
    commands: list[list[str]] = []
    monkeypatch.setattr(cross.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        cross.sysconfig, "get_config_var", lambda name: ".cpython-312-x86_64-linux-gnu.so"
    )
    found = cross.cross_environment(tmp_path / "stubs here", commands.append)
    assert found["SETUPTOOLS_EXT_SUFFIX"] == ".cpython-312-aarch64-linux-gnu.so"
    assert found["CXX"] == f"aarch64-linux-gnu-g++ '-L{tmp_path}/stubs here' -Wl,--no-as-needed"
    assert [command[-1].rpartition("/")[2] for command in commands] == list(cross.STUBS)
    monkeypatch.setattr(cross.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        cross.cross_environment(tmp_path, commands.append)
    assert "needs aarch64-linux-gnu-g++, which was not found" in capsys.readouterr().err
    dist, earlier = script("dist", monkeypatch), tmp_path / "dist" / "earlier.whl"
    earlier.parent.mkdir()
    earlier.touch()
    arguments = ["--wheels", "--aarch64", "--pythons", sys.executable]
    with pytest.raises(SystemExit):
        dist.main([*arguments, "--output", str(earlier.parent)])
    assert earlier.exists()
