"""Makes a release: the changelog's date, a commit, a tag, and what an index gets.

`make release VERSION=0.2.0 DRY=1` tries all of it in a clone below build/release, and changes
nothing here; without DRY=1 the clone's commit and tag are then taken over into this branch. Nothing
is pushed and nothing uploaded; the commands for that are printed. `make wheels` has to be run by
hand, on the tag, because it downloads PyTorch for each Python. Exit code 1 if something is in the
way.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "release"
PLACEHOLDER = ".invalid"


class ReleaseError(SystemExit):
    """One sentence that says what is in the way."""

    def __init__(self, sentence: str) -> None:
        print(f"release: {sentence}", file=sys.stderr)
        super().__init__(1)


def git(folder: Path, *words: str) -> str:
    """The output of git."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def numbers(version: str) -> tuple[int, ...]:
    """The three numbers of a version."""
    if not re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", version):
        raise ReleaseError(f"a version is three numbers, such as 0.2.0, got {version!r}")
    return tuple(map(int, version.split(".")))


def check(folder: Path, version: str) -> None:
    """Refuses a version that exists or goes back, and a tree that others do not have."""
    wanted = numbers(version)
    tags = [tag.removeprefix("v") for tag in git(folder, "tag", "--list", "v*.*.*").splitlines()]
    for tag in tags:
        if re.fullmatch(r"\d+\.\d+\.\d+", tag) and numbers(tag) >= wanted:
            raise ReleaseError(f"there is a tag v{tag}; a release goes on from it")
    if changed := git(folder, "status", "--porcelain"):
        raise ReleaseError(f"the checkout has changes that are in no commit:\n{changed}")


def dated(changelog: str, version: str, day: str) -> str:
    """The changelog with a heading of the version below an empty one of what is unreleased.

    A heading of this version that is there keeps its place, and gets the day.
    """
    heading = f"## [{version}] - {day}"
    there = re.compile(rf"^## \[{re.escape(version)}\].*$", re.M)
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    entries = bool(unreleased and re.search(r"^- ", unreleased[1], re.M))
    if there.search(changelog):
        if entries:
            raise ReleaseError(
                f"the changelog has {version} and, above it, lines that are unreleased: move them "
                "below its heading, or release the next version"
            )
        return there.sub(heading, changelog)
    if not entries:
        raise ReleaseError("the changelog has no line below [Unreleased]: what is released?")
    return changelog.replace("## [Unreleased]\n", f"## [Unreleased]\n\n{heading}\n", 1)


def cited(citation: str, version: str, day: str) -> str:
    """CITATION.cff with this version and day."""
    text = re.sub(r"^version: .*$", f'version: "{version}"', citation, flags=re.M)
    return re.sub(r"^date-released: .*$", f"date-released: {day}", text, flags=re.M)


def prepare(folder: Path, version: str, day: str) -> str:
    """Commits and tags the release in a clone, and returns what changes."""
    for name, change in (("CHANGELOG.md", dated), ("CITATION.cff", cited)):
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8"), version, day), encoding="utf-8")
    changes = git(folder, "diff", "--unified=0")
    # Empty where the files have had the version and today's date.
    git(folder, "commit", "--all", "--allow-empty", "--message", f"Release {version}")
    git(folder, "tag", "--annotate", "--message", f"mmfuse {version}", f"v{version}")
    return changes


def clone(source: Path, target: Path) -> None:
    """Clones a repository, with its tags and the name of who commits."""
    shutil.rmtree(target, ignore_errors=True)
    git(source, "clone", "--quiet", "--no-hardlinks", str(source), str(target))
    for key in ("user.name", "user.email"):
        git(target, "config", key, git(source, "config", key))


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the release, or tries it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    parser.add_argument("--dry", action="store_true", help="only in a clone")
    options = parser.parse_args(argv)
    version = options.version.removeprefix("v")
    check(ROOT, version)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    clone(ROOT, SCRATCH)
    print(prepare(SCRATCH, version, day), flush=True)
    distributions = ROOT / "build" / "dist"
    command = [sys.executable, str(SCRATCH / ".ci" / "dist.py"), "--output", str(distributions)]
    if subprocess.run(command, cwd=SCRATCH, check=False).returncode:
        raise ReleaseError("the distributions are not as an index wants them; nothing has changed")
    names = re.compile(rf"mmfuse-{re.escape(version)}(\.tar\.gz|-.*\.whl)")
    strange = [path.name for path in distributions.iterdir() if not names.fullmatch(path.name)]
    if strange:
        raise ReleaseError(f"{', '.join(strange)} should be of {version}")
    if options.dry:
        print(f"release: a dry run, in {SCRATCH}; nothing has changed here")
        return 0
    git(
        ROOT, "fetch", "--quiet", str(SCRATCH), "HEAD", f"refs/tags/v{version}:refs/tags/v{version}"
    )
    git(ROOT, "merge", "--quiet", "--ff-only", f"v{version}")
    print(
        f"release: v{version} is committed and tagged here. To publish it:\n"
        f"  make wheels        # on this tag: the wheels for an index, in build/dist\n"
        f"  git push --follow-tags\n"
        f"  build/dist_tools/bin/twine upload build/dist/*"
    )
    if PLACEHOLDER in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        print(f"Before that: pyproject.toml names addresses that end in {PLACEHOLDER}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
