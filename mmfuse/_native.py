"""Loads the compiled library once and remembers why a native backend is missing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

_BUILD_NOTES = Path(__file__).with_name("_build.json")

#: Native backends whose kernels are registered in this process.
_loaded: set[str] = set()
_import_error: str | None = None
_module: Any = None


def _build_notes() -> dict[str, str]:
    """What setup.py wrote about the backends that it could not build."""
    try:
        notes: dict[str, str] = json.loads(_BUILD_NOTES.read_text())
    except (OSError, ValueError):
        return {}
    return notes


def _load() -> None:
    global _module, _import_error
    try:
        _module = importlib.import_module("mmfuse._C")
    except ImportError as error:
        _import_error = str(error)
        return
    info = _module.build_info()
    _loaded.update(backend for backend in ("cpu", "cuda") if info[f"has_{backend}"])


def build_info() -> dict[str, Any] | None:
    """Returns compiler, flags, CUDA version and SIMD level of the library, or None without it."""
    return dict(_module.build_info()) if _module is not None else None


def why_missing(backend: str) -> str | None:
    """Returns why the native backend cannot run here, or None when it can."""
    if backend in _loaded:
        return None
    notes = _build_notes()
    if backend in notes:
        return notes[backend]
    if _import_error is not None:
        return f"the compiled library could not be loaded: {_import_error}"
    return f"the compiled library was built without {backend}"


def load_library(path: str | Path, backend: str) -> None:
    """Loads kernels built outside the package, for `backend`, into this process."""
    torch.ops.load_library(str(path))
    _loaded.add(backend)


_load()
