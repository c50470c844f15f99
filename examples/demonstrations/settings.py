"""The tuned settings of the ways to train: a file for each data set, by `compare_methods.py`."""

from __future__ import annotations

import hashlib
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
    """Writes the settings, with the command that found them; those of other ways stay.

    Raises:
        DataError: the settings that are there are damaged, or of another number of trials.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = same_trials(path, trials)
    rounded = {
        way: {name: float(f"{value:.4g}") for name, value in params.items()}
        for way, params in found.items()
    }
    content = {"found by": command, "trials": trials, "settings": kept | rounded}
    replace(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file at once, so that a stop leaves the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def load(path: Path) -> tuple[str, dict[str, Drawn]]:
    """The command that found them, and the settings; none of a file that is not there.

    Raises:
        DataError: the file is damaged.
    """
    content = _content(path)
    return content["found by"], content["settings"]


def same_trials(path: Path, trials: int) -> dict[str, Drawn]:
    """The settings that are there; each is the best of as many trials.

    Raises:
        DataError: the file is damaged, or its settings are of another number of trials.
    """
    content = _content(path)
    if content["settings"] and content.get("trials") != trials:
        raise DataError(
            f"{path} has the best of {content.get('trials')} trials, not of {trials}, and a table "
            "must not mix them: ask for as many trials, or for other --results"
        )
    return content["settings"]


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"found by": "", "settings": {}}
    try:
        content = json.loads(path.read_text())
        numbers = [x for way in content["settings"].values() for x in (way["lr"], *way.values())]
        if not isinstance(content["found by"], str) or not all(
            isinstance(x, (int, float)) for x in numbers
        ):
            raise TypeError("no settings")
        return content
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: take it from the repository again") from None


def fingerprint(settings: Mapping[str, float], epochs: int, batch_size: int) -> str:
    """A short text that changes with what decides a run's numbers beside its way and its seed."""
    content = json.dumps([dict(sorted(settings.items())), epochs, batch_size])
    return hashlib.sha256(content.encode()).hexdigest()[:8]
