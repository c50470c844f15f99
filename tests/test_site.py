"""A mistake in the documents is an error of `make docs`, which runs these tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="`make docs` installs what builds the site")

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "examples")
SITE = ROOT / "build" / "site"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE.is_dir(), reason="`make docs` builds the site before these tests"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The documents, to be changed; the package is that of the checkout."""
    for name in NEEDED:
        source = ROOT / name
        made = shutil.copytree if source.is_dir() else shutil.copy
        made(source, tmp_path / name)
    for name in ("mmfuse", "benchmarks", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def build(folder: Path) -> tuple[int, str]:
    """The exit status, and everything that was printed."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_every_mistake_is_an_error(copy: Path) -> None:
    """One build has all mistakes, since it takes some seconds; its output names each."""
    edit(copy / "docs" / "start.md", "(which_method.md)", "(which_methods.md)")
    edit(copy / "docs" / "index.md", "(other_tasks.md#other-tasks", "(other_tasks.md#otter-tasks")
    edit(copy / "docs" / "api.md", "::: mmfuse.unimodal_outputs\n", "")
    edit(copy / "docs" / "methods" / "ogm.md", "<!-- facts -->", "")
    (copy / "docs" / "methods" / "mlb.md").unlink()
    with (copy / "README.md").open("a") as readme:
        readme.write("more\n" * 150)
    status, printed = build(copy)
    assert status != 0
    for mistake in (
        "which_methods.md",
        "#otter-tasks",
        "mmfuse.unimodal_outputs",
        "methods/ogm.md: <!-- facts -->",
        "not both pages and methods: {'mlb'}",
        "README.md has",
    ):
        assert mistake in printed, printed


def test_pages_have_formulas_pictures_and_code_and_fetch_nothing() -> None:
    """The site is the one that `make docs` has built before it runs this."""
    page = (SITE / "methods" / "ogm.html").read_text()
    assert "<math" in page and "arithmatex" not in page
    assert "images/coefficients/ogm-ge.svg" in page
    assert "A small step of OGM-GE" in page and "12 bytes for each" in page
    assert "tested against numbers that the authors" in page
    fetched = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"')
    pages = list(SITE.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        text = path.read_text()
        assert fetched.findall(text) == [], path
        if path.name != "contributing.html":  # which is about the marks
            assert not re.search(r"::: |--8&lt;--|&lt;!-- ", text), path
