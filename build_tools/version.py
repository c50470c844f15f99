"""The version: the tag of a release; between releases the next number and the commit.

No source holds it. A source distribution has it in PKG-INFO, a repository in its tags, and an
archive of one in .git_archival.txt. A tree that knows no tag, such as a shallow clone, goes by the
last release of CHANGELOG.md.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from .recipe import ROOT

NO_RELEASE = "0.0.0"
TAG = re.compile(r"\d+\.\d+\.\d+")


def released(changelog: str) -> str:
    """The last version of a changelog that has a date; 0.0.0 without any."""
    found = re.search(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, re.M)
    return found[1] if found else NO_RELEASE


def last_release() -> str:
    """The last release that the changelog of this tree names."""
    path = ROOT / "CHANGELOG.md"
    return released(path.read_text(encoding="utf-8")) if path.is_file() else NO_RELEASE


def development(last: str, distance: int) -> str:
    """The version that a number of commits after a release is on the way to."""
    *upper, patch = last.split(".")
    return f"{'.'.join(upper)}.{int(patch) + 1}.dev{distance}"


def is_release(found: Any) -> bool:
    """True on the very commit of a tag, and where nothing was changed since."""
    # Without a tag, setuptools-scm takes the fallback, or 0.0.
    return bool(found.exact and TAG.fullmatch(str(found.tag)))


def of_commit(found: Any) -> str:
    """Setuptools-scm's scheme of a version: the tag, or what comes after it."""
    if is_release(found):
        return str(found.tag)
    last = str(found.tag) if TAG.fullmatch(str(found.tag)) else last_release()
    return development(last, found.distance or 0)


def local_part(found: Any) -> str:
    """Setuptools-scm's scheme of what follows: nothing, or the commit and if it was changed."""
    if is_release(found):
        return ""
    node = (found.node or "").removeprefix("g")[:9]
    return f"+{f'g{node}' if node else 'unknown'}{'.dirty' if found.dirty else ''}"


def version() -> str:
    """The version of this tree, such as "0.1.0" or "0.1.1.dev7+g1a2b3c4d5"."""
    info = ROOT / "PKG-INFO"
    if info.is_file():
        written = re.search(r"^Version: (\S+)$", info.read_text(encoding="utf-8"), re.M)
        if written:
            return written[1]
    base = development(last_release(), 0)
    try:
        from setuptools_scm import get_version
    except ImportError:
        print(f"mmfuse: without setuptools-scm the version is {base}+unknown", file=sys.stderr)
        return f"{base}+unknown"
    found = str(
        get_version(
            root=str(ROOT),
            version_scheme=of_commit,
            local_scheme=local_part,
            fallback_version=base,
        )
    )
    return f"{base}+unknown" if found == base else found
