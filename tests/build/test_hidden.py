"""A checkout whose package is installed elsewhere, without libraries of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from installs import run

import mmfuse


@pytest.fixture
def installed(source: Path, tmp_path: Path) -> Path:
    """A folder of packages in which mmfuse is installed, beside the checkout `source`."""
    packages = tmp_path / "packages"
    shutil.copytree(source / "mmfuse", packages / "mmfuse")
    for library in Path(mmfuse.__file__).parent.glob("*.so"):
        shutil.copy(library, packages / "mmfuse")
    return packages


@pytest.mark.slow
def test_a_checkout_that_hides_the_installed_package_says_so(source: Path, installed: Path) -> None:
    def report(folder: Path) -> str:
        done = run([sys.executable, "-m", "mmfuse"], folder, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = report(source)
    first = text.splitlines()[0]
    assert first.startswith("mmfuse ") and first.endswith(f" in {source / 'mmfuse'}")
    assert (
        f"{source / 'mmfuse'} hides the mmfuse that is installed in {installed / 'mmfuse'}: "
        f"run Python from another folder, or install with `pip install -e {source}`"
    ) in text
    text = report(installed.parent)
    assert text.splitlines()[0].endswith(f" in {installed / 'mmfuse'}")
    assert "that is installed in" not in text
