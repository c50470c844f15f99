"""The methods of the catalogue that act on gradients, such that they act in most of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mmfuse import METHODS, GradientMethod, NoiseStream

Encoders = dict[str, nn.Module]
Make = Callable[..., GradientMethod]

# InfoReg's window is open from the third epoch on; RedReg regulates whoever is ahead.
ACTING: dict[str, dict[str, Any]] = {
    "InfoReg": {"threshold": -1e9},
    "RedReg": {"epochs": 3, "threshold": -1e9, "agreement": (-2.0, -2.0)},
}


def maker(name: str) -> Make:
    """A callable that makes the method from encoders, with a stream of its own if it draws."""

    def make(encoders: Encoders, **changes: Any) -> GradientMethod:
        stream = changes.pop("stream", NoiseStream(3))
        made = METHODS[name](encoders, **{**ACTING.get(name, {}), **changes})
        if made.rule.need.stream:
            made.stream = stream
        return made

    make.__name__ = name
    return make


#: Those that a framework's own backward pass suffices for.
MAKERS: dict[str, Make] = {
    name: maker(name)
    for name, made in METHODS.items()
    if made.card.acts == "gradient" and "logits" in made.card.needs
}
#: By a lower-case name, those of them that need logits only and act with their defaults.
PLAIN = {
    name.lower(): METHODS[name]
    for name in MAKERS
    if METHODS[name].card.needs == ("logits",) and name not in ("OGM", "InfoReg")
}
ogm_ge, inforeg, redreg = MAKERS["OGM"], MAKERS["InfoReg"], MAKERS["RedReg"]


def needed(method: GradientMethod, seen: dict[str, Any]) -> dict[str, Any]:
    """Without the features and inputs that the method does not look at."""
    more = {"features", "inputs"}.difference(method.rule.need.inputs)
    return {name: value for name, value in seen.items() if name not in more}


def acted(method: GradientMethod, results: list[Any]) -> bool:
    """True if a step has modulated anything."""
    idle = method.rule.need.neutral
    return any(bool((r.coefficients != idle).any()) for r in results)
