"""Numbers that a user passes in: of Python, NumPy or anything else that counts."""

from __future__ import annotations

import math
import operator
from typing import SupportsIndex

from torch import Tensor


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """The integer, as Python's own, at least `least`.

    Raises:
        TypeError: it is no integer; 5.0, True and tensors are none. The message has the name.
        ValueError: it is less.
    """
    if isinstance(value, (bool, Tensor, type)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    found = operator.index(value)
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def real(name: str, value: object) -> float:
    """The number, as Python's own.

    Raises:
        TypeError: it is no number. The message has the name.
        ValueError: it is an integer beyond all of float's.
    """
    numeric = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    try:
        if numeric:
            return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got {value}") from None
    except (TypeError, ValueError, RuntimeError):  # of a complex tensor, and one without a value
        pass
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def finite(name: str, value: object) -> bool:
    """True if a number is neither infinite nor NaN; a TypeError with the name if it is none."""
    return math.isfinite(real(name, value))
