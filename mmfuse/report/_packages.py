"""Packages of the extra `report`, which are imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

#: The name to install a package by, if it differs from the module's.
INSTALLED_AS = {"sklearn": "scikit-learn"}


def package(module: str) -> Any:
    """Imports a module of the extra.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or module).partition(".")[0]
        name = INSTALLED_AS.get(name, name)
        raise ImportError(f"mmfuse's imbalance report needs {name}: pip install {name}") from error
