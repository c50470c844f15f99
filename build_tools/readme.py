"""README.md as a package index shows it: without links that lead nowhere there.

An index resolves neither paths in the repository nor headings. With a `Source` among the URLs of
pyproject.toml paths become links to it; without one they stay as plain text.
"""

from __future__ import annotations

import re

from .recipe import ROOT

# Code, in which nothing is a link; or an image or a link, whose text may have code.
_CODE = r"```.*?```|`[^`\n]+`"
_LINK = r"(?P<image>!?)\[(?P<label>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^)\s]+)\)"
_PARTS = re.compile(f"{_CODE}|{_LINK}", re.S)


def source_url(project: str) -> str:
    """The `Source` of [project.urls] in a pyproject.toml; empty without one."""
    # Python 3.10 cannot read TOML.
    found = re.search(r'^\[project\.urls\]$[^[]*?^"?Source"?\s*=\s*"([^"]+)"', project, re.M)
    return found[1].rstrip("/") if found else ""


def converted(text: str, source: str) -> str:
    """A text of Markdown for an index; code stays as it is."""

    def link(found: re.Match[str]) -> str:
        image, label, target = found["image"], found["label"], found["target"]
        if target is None or re.match(r"[a-z]+:", target):
            return found[0]
        if source and not target.startswith("#"):
            return f"{image}[{label}]({source}/{'raw' if image else 'blob'}/HEAD/{target})"
        return f"*{label}*" if image else label

    return _PARTS.sub(link, text)


def for_index() -> str:
    """README.md of this tree for an index."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return converted((ROOT / "README.md").read_text(encoding="utf-8"), source_url(project))
