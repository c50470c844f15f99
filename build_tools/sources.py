"""The sources of a library in one text, by which it can be told from one that other sources made.

`mmfuse._native` takes it from here, in a checkout, and so does the benchmark; it imports nothing of
PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
#: The folders beside a library's own that its sources include.
SHARED = ("common", "glue", "portable")


def library_digest(library: str, csrc: Path = CSRC) -> str:
    """Of all files that may be compiled into libmmfuse_<library>.so."""
    found = [csrc / "facts" / f"{library}.cpp"]
    for folder in (library, *SHARED):
        found += _files(csrc / folder)
    return _digest(found, csrc)


def digest(folder: Path) -> str:
    """Of all files of a folder."""
    return _digest(_files(folder), folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(paths: Iterable[Path], root: Path) -> str:
    """Of names and contents."""
    total = hashlib.sha256()
    for path in paths:
        content, name = path.read_bytes(), path.relative_to(root).as_posix()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]
