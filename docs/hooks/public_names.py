"""Every public name has an entry in the reference, or the build fails."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

import mmfuse
from mmfuse.adapters import accelerate, lightning, transformers

log = logging.getLogger("mkdocs.hooks.public_names")

#: Names that are data or folders: their pages describe them in words.
NOT_DOCUMENTED = {"mmfuse.METHODS"}


def public() -> set[str]:
    """The dotted names that users may rely on."""
    names = {f"mmfuse.{n}" for n in dir(mmfuse) if not n.startswith("_")}
    modules = {f"mmfuse.{n}" for n in ("ops", "amp", "scores")}
    # The module that defines it counts: beside `grad_stats` there is a module of the name.
    operators = (getattr(mmfuse.ops, n) for n in mmfuse.ops.__all__ if n != "BACKENDS")
    names |= {f"{operator.__module__}.{operator.__name__}" for operator in operators}
    for module in (mmfuse.amp, mmfuse.scores, accelerate, lightning, transformers):
        names |= {f"{module.__name__}.{n}" for n in _defined(module)}
    return names - NOT_DOCUMENTED - modules


def _defined(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def documented(inventory: Path) -> set[str]:
    """The names in the inventory that mkdocstrings writes, after its four lines of header."""
    body = inventory.read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines()}


@event_priority(-100)
def on_post_build(config: MkDocsConfig) -> None:
    """Warns of what is missing; `strict` makes an error of it."""
    missing = public() - documented(Path(config.site_dir) / "objects.inv")
    if missing:
        log.warning("public names without an entry in the reference: %s", sorted(missing))
