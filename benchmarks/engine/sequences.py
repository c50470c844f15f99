"""Finds `released/`, the authors' sequences, which lies beside this folder and is not installed.

`sequences.ogm` is `released/ogm.py`; a file that is added needs no line here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# It goes to the end, so that an installed mmfuse stays the one that is measured.
sys.path.append(str(Path(__file__).resolve().parents[2]))


def __getattr__(name: str) -> ModuleType:
    full = f"released.{name}"
    if name.startswith("_") or importlib.util.find_spec(full) is None:
        raise AttributeError(f"there is no released/{name}.py")
    return importlib.import_module(full)
