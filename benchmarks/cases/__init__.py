"""The cases: an op or a method in a file, with its inputs, its gate and all providers.

A new file is found by itself. `CASES` and `WORKLOADS` go by name; a method of mmfuse's catalogue
that has no file gets a training step from its card. Files that need an op which the package of
another commit does not have yet are left out, with a line that says so.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

from engine.case import CASES, Case
from engine.from_card import add_missing_methods
from engine.workloads import WORKLOADS

import mmfuse

_OWN = Path(mmfuse.__file__).parents[1] == Path(__file__).parents[2]

for _found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    try:
        importlib.import_module(f"{__name__}.{_found}")
    except ImportError as error:
        if _OWN or not (error.name or "").startswith("mmfuse"):
            raise
        print(f"cases: {_found} is left out: {error}", file=sys.stderr)
add_missing_methods()

__all__ = ["CASES", "WORKLOADS", "Case"]
