"""The methods that the adapters are tested with, such that they act in most of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mmfuse import OGM, GradientMethod, InfoReg, NoiseStream, RedReg

Encoders = dict[str, nn.Module]
Make = Callable[..., GradientMethod]


def ogm_ge(encoders: Encoders, **changes: Any) -> OGM:
    return OGM(encoders, **{"stream": NoiseStream(3), **changes})


def inforeg(encoders: Encoders, **changes: Any) -> InfoReg:
    # The window is open from the third epoch on. It draws no random numbers.
    changes.pop("stream", None)
    return InfoReg(encoders, **{"threshold": -1e9, **changes})


def redreg(encoders: Encoders, **changes: Any) -> RedReg:
    # Whoever is ahead is regulated, in every step.
    always = {"epochs": 3, "threshold": -1e9, "agreement": (-2.0, -2.0)}
    return RedReg(encoders, **{**always, "stream": NoiseStream(4), **changes})


MAKERS: dict[str, Make] = {"ogm-ge": ogm_ge, "inforeg": inforeg, "redreg": redreg}


def needed(method: GradientMethod, seen: dict[str, Any]) -> dict[str, Any]:
    """Without the features and inputs that the method does not look at."""
    more = {"features", "inputs"}.difference(method.rule.need.inputs)
    return {name: value for name, value in seen.items() if name not in more}


def acted(method: GradientMethod, results: list[Any]) -> bool:
    """Whether a step has modulated anything."""
    idle = method.rule.need.neutral
    return any(bool((r.coefficients != idle).any()) for r in results)
