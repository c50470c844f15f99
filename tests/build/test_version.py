"""The version: from a tag, a commit, an archive, a source distribution, or the changelog."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installs import ROOT, run

from build_tools.version import development, released

SHOW = "import build_tools.version as v; print(v.version())"


def git(folder: Path, *words: str) -> str:
    user = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")
    done = subprocess.run(
        ["git", *user, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def version(folder: Path) -> str:
    done = run([sys.executable, "-W", "ignore", "-c", SHOW], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that the version is read from; 0.1.0 is the last release. It is no repository."""
    folder = tmp_path / "träé e"
    shutil.copytree(ROOT / "build_tools", folder / "build_tools")
    for name in (".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text("__pycache__/\n")
    (folder / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.1.0] - 2026-11-29\n")
    return folder


@pytest.fixture
def repository(tree: Path) -> Path:
    """The same in a repository of one commit, without a tag."""
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "one")
    return tree


def unpacked(repository: Path, target: Path) -> Path:
    """The repository's last commit as an archive has it."""
    git(repository, "archive", "--format=zip", f"--output={target}.zip", "HEAD")
    shutil.unpack_archive(f"{target}.zip", target)
    return target


def test_a_tag_is_the_version(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "v0.2.0")
    assert version(repository) == "0.2.0"
    assert version(unpacked(repository, tmp_path / "archive")) == "0.2.0"
    # The tree differs from the tag from here on.
    (repository / "CHANGELOG.md").write_text("changed\n")
    node = git(repository, "rev-parse", "--short=9", "HEAD")
    assert version(repository) == f"0.2.1.dev0+g{node}.dirty"


def test_after_a_tag_it_is_the_next_and_the_commit(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "v0.2.0")
    git(repository, "tag", "not-a-version")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "two")
    node = git(repository, "rev-parse", "--short=9", "HEAD")
    assert version(repository) == f"0.2.1.dev1+g{node}"
    # An archive has the node as git shortens it.
    found = version(unpacked(repository, tmp_path / "archive"))
    assert re.fullmatch(r"0\.2\.1\.dev1\+g[0-9a-f]{7,9}", found)
    assert node.startswith(found.partition("+g")[2])


def test_without_a_tag_it_goes_by_the_changelog(repository: Path, tmp_path: Path) -> None:
    node = git(repository, "rev-parse", "--short=9", "HEAD")
    assert re.fullmatch(rf"0\.1\.1\.dev[01]\+g{node}", version(repository))
    assert version(unpacked(repository, tmp_path / "archive")) == f"0.1.1.dev0+g{node}"
    # A shallow clone has no tags.
    git(repository, "tag", "v0.2.0")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "two")
    git(tmp_path, "clone", "--quiet", "--depth=1", repository.as_uri(), "shallow")
    node = git(repository, "rev-parse", "--short=9", "HEAD")
    assert re.fullmatch(rf"0\.1\.1\.dev\d\+g{node}", version(tmp_path / "shallow"))


def test_a_tree_without_a_repository_says_that_its_commit_is_unknown(tree: Path) -> None:
    assert version(tree) == "0.1.1.dev0+unknown"
    (tree / "CHANGELOG.md").unlink()
    assert version(tree) == "0.0.1.dev0+unknown"


def test_a_source_distribution_knows_its_version(repository: Path) -> None:
    (repository / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: mmfuse\nVersion: 0.3.0\n")
    assert version(repository) == "0.3.0"


def test_a_folder_in_another_repository_is_not_that_one(tree: Path) -> None:
    """An unpacked archive may lie below one's own project, for example."""
    git(tree.parent, "init", "--quiet")
    git(tree.parent, "commit", "--quiet", "--allow-empty", "--message", "one")
    git(tree.parent, "tag", "v9.0.0")
    assert version(tree) == "0.1.1.dev0+unknown"


def test_without_setuptools_scm_it_says_so(repository: Path) -> None:
    git(repository, "tag", "v0.2.0")
    hide = "import sys; sys.modules['setuptools_scm'] = None; "
    done = run([sys.executable, "-c", hide + SHOW], repository)
    assert done.stdout == "0.1.1.dev0+unknown\n"
    assert done.stderr == "mmfuse: without setuptools-scm the version is 0.1.1.dev0+unknown\n"


def test_the_changelog_names_the_last_release_first() -> None:
    text = "## [Unreleased]\n## [0.10.0] - 2027-01-02\n## [0.9.3] - 2026-12-30\n"
    assert released(text) == "0.10.0"
    assert released("## [Unreleased]\n## [0.2.0]\n") == "0.0.0"
    assert development("0.9.9", 3) == "0.9.10.dev3"
