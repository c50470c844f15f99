"""The cases: an op or a method in a file, with its inputs, its gate and all providers.

A new file is found by itself. `CASES` and `WORKLOADS` go by name; a method of mmfuse's catalogue
that has no file gets a training step from its card.
"""

from __future__ import annotations

import importlib
import pkgutil

from engine.case import CASES, Case
from engine.from_card import add_missing_methods
from engine.workloads import WORKLOADS

for _found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_found}")
add_missing_methods()

__all__ = ["CASES", "WORKLOADS", "Case"]
