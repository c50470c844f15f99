"""The sources of a library in one text, by which a library is known that was built from others.

`mmfuse._native` takes it from here, in a checkout; it imports nothing of PyTorch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
#: The folders beside a library's own that its sources include.
SHARED = ("common", "glue", "portable")


def digest(library: str, csrc: Path = CSRC) -> str:
    """Of all files that may be compiled into libmmfuse_<library>.so: names and contents."""
    found = [csrc / "facts" / f"{library}.cpp"]
    for folder in (library, *SHARED):
        found += sorted(path for path in (csrc / folder).rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in found:
        total.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
