"""Docstrings as the site shows them: the literal blocks of `help()` become Python code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_LITERAL = re.compile(r"^( *)(\S.*)?::\n\n((?:\1 {4}.*\n|\n)+)", re.MULTILINE)


def fenced(text: str) -> str:
    """Replaces "::" and the indented block after it by a fenced block."""

    def block(found: re.Match[str]) -> str:
        indent, before, code = found[1], found[2], textwrap.dedent(found[3]).strip("\n")
        lead = f"{indent}{before}:\n\n" if before else ""
        lines = ["```python", *code.splitlines(), "```"]
        return lead + "".join(f"{indent}{line}\n" for line in lines) + "\n"

    return _LITERAL.sub(block, text + "\n").rstrip("\n")


class LiteralBlocks(griffe.Extension):
    """Applies `fenced` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
