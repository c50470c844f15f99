"""Scores and coefficients over training, from what every step returned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._numbers import real

#: A longer history is shown as means of so many parts.
MOST_POINTS = 100


class History(NamedTuple):
    """Every [M] field of the steps.

    Attributes:
        steps: Of each point, the middle of the steps that it is a mean of.
        per_point: Steps that a point is the mean of.
        fields: Such as "scores" → modality → a value for each point; NaN where there was none.
    """

    steps: list[float]
    per_point: int
    fields: dict[str, dict[str, list[float]]]


def history_of(steps: Any) -> History | None:
    """The history from the mappings that a method's `as_dict()` gives, one for each step.

    Raises:
        TypeError: it is no sequence of mappings of scalars.
        ValueError: it has no tag like "scores/audio".
    """
    if steps is None or (isinstance(steps, Sequence) and not steps):
        return None
    if not isinstance(steps, Sequence) or not all(isinstance(step, Mapping) for step in steps):
        kind = type(steps).__name__
        if isinstance(steps, Sequence):
            kind += " of " + type(next(s for s in steps if not isinstance(s, Mapping))).__name__
        raise TypeError(
            f"history must be a list of what out.as_dict() gave in each step, got {kind}"
        )
    tags = dict.fromkeys(tag for step in steps for tag in step if _is_tag(tag))
    if not tags:
        raise ValueError(
            f'history has no tag such as "scores/audio", only {sorted(map(str, steps[0]))}: give '
            "out.as_dict() of each step"
        )
    count = len(steps)
    per_point = math.ceil(count / MOST_POINTS)
    starts = range(0, count, per_point)
    numbers = [_number("step", step.get("step", i)) for i, step in enumerate(steps)]
    fields: dict[str, dict[str, list[float]]] = {}
    for tag in tags:
        name, _, modality = tag.partition("/")
        values = [_number(tag, step[tag]) if tag in step else math.nan for step in steps]
        fields.setdefault(name, {})[modality] = [
            _mean(values[start : start + per_point]) for start in starts
        ]
    points = [_mean(numbers[start : start + per_point]) for start in starts]
    return History(points, per_point, fields)


def _is_tag(tag: Any) -> bool:
    return isinstance(tag, str) and 0 < tag.find("/") < len(tag) - 1


def _number(tag: str, value: Tensor | float) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"history has {list(value.shape)} for {tag!r}, which must be a scalar")
        return float(value.detach())
    return real(f"history's {tag!r}", value)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan
