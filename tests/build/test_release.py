"""`make release`: in a repository of its own, with distributions that are only names."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from installs import ROOT

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n- New.\n\n## [0.1.0] - 2026-01-02\n\n- Old.\n"
CITATION = 'version: "0.1.0"\ndate-released: 2026-01-02\nlicense: BSD-3-Clause\n'
DIST = """import pathlib, subprocess, sys
folder = pathlib.Path(sys.argv[2])
folder.mkdir(parents=True)
tag = subprocess.run(["git", "describe", "--tags"], capture_output=True, text=True).stdout.strip()
(folder / f"mmfuse-{tag[1:]}.tar.gz").touch()
sys.exit(pathlib.Path("broken").exists())
"""


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a repository of one commit."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "root"
    (root / ".ci").mkdir(parents=True)
    (root / ".gitignore").write_text("/build/\n")
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    (root / "CITATION.cff").write_text(CITATION)
    (root / "pyproject.toml").write_text('email = "authors@mmfuse.invalid"\n')
    (root / ".ci" / "dist.py").write_text(DIST)
    git(root, "init", "--quiet")
    git(root, "config", "user.name", "a")
    git(root, "config", "user.email", "a@example.invalid")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "SCRATCH", root / "build" / "release")
    return module


def state(release: ModuleType) -> tuple[str, str, str]:
    root = release.ROOT
    return git(root, "rev-parse", "HEAD"), git(root, "tag"), git(root, "status", "--porcelain")


def test_a_dry_run_changes_nothing(release: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    before = state(release)
    assert release.main(["0.2.0", "--dry"]) == 0
    assert state(release) == before
    printed = capfd.readouterr().out
    assert re.search(r"^\+## \[0\.2\.0\] - \d{4}-\d\d-\d\d$", printed, re.M)
    assert re.search(r"^\+version: \"0\.2\.0\"$", printed, re.M)
    assert "nothing has changed here" in printed
    assert git(release.SCRATCH, "tag") == "v0.2.0"


def test_a_release_is_a_commit_and_a_tag(
    release: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert release.main(["v0.2.0"]) == 0
    root = release.ROOT
    assert git(root, "describe", "--tags") == "v0.2.0"
    assert git(root, "log", "-1", "--format=%s") == "Release 0.2.0"
    assert git(root, "status", "--porcelain") == ""
    text = (root / "CHANGELOG.md").read_text()
    assert re.search(r"## \[Unreleased\]\n\n## \[0\.2\.0\] - [\d-]+\n\n- New\.\n\n## \[0\.1", text)
    assert 'version: "0.2.0"\n' in (root / "CITATION.cff").read_text()
    printed = capfd.readouterr().out
    assert "twine upload build/dist/*" in printed
    assert "Before that: pyproject.toml names addresses that end in .invalid." in printed
    # The next one has nothing to say yet.
    with pytest.raises(SystemExit):
        release.main(["0.3.0"])
    assert "no line below [Unreleased]" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("0.2", "a version is three numbers, such as 0.2.0, got '0.2'"),
        ("0.02.0", "a version is three numbers, such as 0.2.0, got '0.02.0'"),
        ("0.1.9", "there is a tag v0.2.0; a release goes on from it"),
        ("0.2.0", "there is a tag v0.2.0; a release goes on from it"),
        ("0.1.0", "there is a tag v0.2.0; a release goes on from it"),
    ],
)
def test_a_version_that_goes_back_is_refused(
    version: str, sentence: str, release: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    git(release.ROOT, "tag", "v0.2.0")
    git(release.ROOT, "tag", "v0.2.0-notes")
    before = state(release)
    with pytest.raises(SystemExit):
        release.main([version])
    assert capfd.readouterr().err == f"release: {sentence}\n"
    assert state(release) == before


def test_what_is_in_no_commit_is_not_released(
    release: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    (release.ROOT / "new.py").touch()
    with pytest.raises(SystemExit):
        release.main(["0.2.0"])
    assert "changes that are in no commit:\n?? new.py" in capfd.readouterr().err


def test_distributions_with_a_fault_leave_everything_as_it_was(
    release: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    (release.ROOT / "broken").touch()
    git(release.ROOT, "add", "--all")
    git(release.ROOT, "commit", "--quiet", "--message", "two")
    before = state(release)
    with pytest.raises(SystemExit):
        release.main(["0.2.0"])
    assert "not as an index wants them; nothing has changed" in capfd.readouterr().err
    assert state(release) == before


def test_a_heading_that_is_there_gets_the_day(release: ModuleType) -> None:
    text = "## [Unreleased]\n\n## [0.2.0] - 2026-01-02\n\n- New.\n"
    dated = release.dated(text, "0.2.0", "2026-03-04")
    assert dated == text.replace("2026-01-02", "2026-03-04")
    with pytest.raises(SystemExit):
        release.dated(text.replace("[Unreleased]\n", "[Unreleased]\n\n- Newer.\n"), "0.2.0", "day")


def test_changelog_and_citation_name_the_same_release(release: ModuleType) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.findall(r"^## \[([\d.]+)\] - ([\d-]{10})$", changelog, re.M)[0]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert release.cited(citation, version, day) == citation
    assert release.cited(citation, "9.9.9", "2099-01-01") != citation
