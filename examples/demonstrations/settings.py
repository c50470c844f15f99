"""The tuned settings of the ways to train: a file for each data set, found by `compare.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import DataError

Drawn = dict[str, float]


def folded(params: Mapping[str, float]) -> tuple[float | None, dict[str, Any]]:
    """The learning rate, and a method's options, of what was drawn.

    A value for each modality is "<name>.<modality>".
    """
    options: dict[str, Any] = {}
    for name, value in params.items():
        of, dot, view = name.partition(".")
        if dot:
            options.setdefault(of, {})[view] = value
        elif name != "lr":
            options[name] = value
    return params.get("lr"), options


def save(path: Path, command: str, trials: int, found: Mapping[str, Drawn]) -> None:
    """Writes the settings, with the command that found them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        way: {name: float(f"{value:.4g}") for name, value in params.items()}
        for way, params in found.items()
    }
    content = {"found by": command, "trials": trials, "settings": rounded}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> tuple[str, dict[str, Drawn]]:
    """The command that found them, and the settings; none of a file that is not there.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return "", {}
    try:
        content = json.loads(path.read_text())
        return content["found by"], content["settings"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: take it from the repository again") from None
