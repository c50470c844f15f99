"""Checks of the report's arguments, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._numbers import real
from ..loop.matching import match_parameters
from ..ops._arguments import check_instance

Calls = dict[str, Callable[..., Any]]


def names_of(modalities: Sequence[str]) -> tuple[str, ...]:
    """The names of `modalities=`."""
    if isinstance(modalities, str) or not isinstance(modalities, (Sequence, Mapping)):
        raise TypeError(
            f"modalities must be a list of names, got {type(modalities).__name__} {modalities!r}"
        )
    found = tuple(modalities)
    wrong = [name for name in found if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"modalities must be names, got {type(wrong[0]).__name__}")
    check_several(found)
    return found


def check_several(names: Sequence[str]) -> None:
    """Raises a ValueError where there are fewer than two, or one twice."""
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"a report needs two or more different modalities, got {list(names)}")


def severities_of(severities: Sequence[float]) -> tuple[float, ...]:
    """The positive numbers of `severities=`, in rising order."""
    if isinstance(severities, (str, bytes, Tensor)) or not isinstance(severities, Iterable):
        raise TypeError(f"severities must be numbers, got {type(severities).__name__}")
    found = sorted({real("severities", severity) for severity in severities})
    if not all(0 < severity < math.inf for severity in found):
        raise ValueError(f"severities must be positive and finite, got {list(severities)}")
    return tuple(found)


def calls_of(called: str, given: Mapping[str, Any] | nn.ModuleDict | None) -> Calls:
    """Name → what is called for this modality."""
    if given is None:
        return {}
    if not isinstance(given, (Mapping, nn.ModuleDict)):
        raise TypeError(f"{called} must map names to callables, got {type(given).__name__}")
    for name, value in given.items():
        if not callable(value):
            raise TypeError(
                f"{called}[{name!r}] must be a module or another callable, got "
                f"{type(value).__name__}"
            )
        check_instance(f"{called}[{name!r}]", value)
    return dict(given.items())


def encoders_of(model: object, given: Any) -> Calls:
    """The encoders of `encoders=`, those that are names looked up in the model.

    Raises:
        TypeError: names for a model that is no module, or encoders of another kind.
        ValueError: a name is of no module of the model.
    """
    if not isinstance(given, Mapping):
        return calls_of("encoders", given)
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    if not texts:
        return calls_of("encoders", given)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"encoders has names, but the model is no module but {type(model).__name__}: give the "
            "encoders themselves"
        )
    matched: dict[str, Any] = dict(match_parameters(model, texts))
    for name, value in matched.items():
        if not isinstance(value, nn.Module):
            raise ValueError(
                f"encoders[{name!r}]: {texts[name]!r} names parameters, where a module that can be "
                "called is needed"
            )
    return calls_of("encoders", {**given, **matched})


def check_known(names: Sequence[str], **given: Mapping[str, Any]) -> None:
    """Raises a ValueError where a mapping has a name that is no modality's."""
    for called, mapping in given.items():
        strange = [name for name in mapping if name not in names]
        if strange:
            raise ValueError(f"{called} names {strange}, but the modalities are {list(names)}")


def device_of(model: object) -> torch.device | None:
    """The model's device; None if it has no parameters or is no module."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if parameter is None else parameter.device
