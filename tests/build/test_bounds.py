"""`make bounds`: the versions that it installs, and its error without a Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from installs import ROOT

from build_tools.backend import TORCH


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))  # as for a script there
    spec = importlib.util.spec_from_file_location("bounds", ROOT / ".ci" / "bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_versions_are_those_of_pyproject(bounds: ModuleType) -> None:
    found = bounds.lower_bounds((ROOT / "pyproject.toml").read_text())
    assert f"torch>={found['torch']}" == TORCH
    assert f"torch=={found['torch']}" in bounds.pins("3.10", found)
    assert "numpy==1.26" in bounds.pins("3.10", found)
    assert "numpy==2.1.0" in bounds.pins("3.13", found)
    oldest = min(bounds.PYTHONS, key=lambda name: int(name.rpartition(".")[2]))
    needed = oldest.removeprefix("python")
    assert f'requires-python = ">={needed}"' in (ROOT / "pyproject.toml").read_text()


def test_the_tests_that_it_runs_are_there(bounds: ModuleType) -> None:
    for name in bounds.TESTS:
        assert (ROOT / name).exists(), name


def test_without_a_python_it_says_so(
    bounds: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    link = tmp_path / "python3.10"
    link.write_text("#!/bin/sh\nexit 127\n")  # as a manager's, of a Python that is not chosen
    link.chmod(0o755)
    for program in ("no-such-python", str(link)):
        assert bounds.main([program]) == 2
        expected = f"make bounds needs {program}, which is no Python that starts\n"
        assert capsys.readouterr().err == expected
