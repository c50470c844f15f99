"""Numbers that a user passes in: of Python, NumPy or anything else that counts."""

from __future__ import annotations

import math
import operator
from typing import SupportsIndex

import torch
from torch import Tensor


def whole(
    name: str, value: SupportsIndex, least: int | None = None, most: int | None = None
) -> int:
    """The integer, as Python's own, at least `least` and at most `most`.

    Raises:
        TypeError: it is no integer; 5.0, True, tensors and arrays are none. The message has the
            name.
        ValueError: it is less or more.
    """
    if isinstance(value, (bool, Tensor, type)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        found = operator.index(value)
    except TypeError:  # NumPy's arrays have __index__, and refuse
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    if most is not None and found > most:
        raise ValueError(f"{name} must be at most {most:,}, got {found}")
    return found


#: Tables [M, M] of more would take memory by the gigabyte before anything was trained.
MOST_MODALITIES = 1024
#: Nor do tables hold more steps, validations or permutations than this.
MOST_STEPS = 1_000_000


def real(name: str, value: object) -> float:
    """The number, as Python's own.

    Raises:
        TypeError: it is no number. The message has the name.
        ValueError: it is an integer beyond all of float's.
    """
    numeric = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dtype.itemsize < 2:
            raise TypeError(f"{name} must be a number, got {value.dtype}, which has no arithmetic")
        if value.layout is not torch.strided:  # it can be turned into a number, and not be compared
            raise TypeError(f"{name} must be a number, got a tensor of layout {value.layout}")
    try:
        if numeric:
            return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {value}") from None
    except (TypeError, ValueError, RuntimeError):  # of a complex tensor, and one without a value
        pass
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def flag(name: str, value: object) -> bool:
    """True or False, Python's or NumPy's; a TypeError with the name for anything else."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def finite(name: str, value: object) -> bool:
    """True if a number is neither infinite nor NaN; a TypeError with the name if it is none."""
    return math.isfinite(real(name, value))
