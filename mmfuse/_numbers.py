"""Numbers that a user passes in: integers of Python, NumPy or anything else that counts."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from torch import Tensor


def whole(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """The integer, as Python's own, at least `least`.

    Raises:
        TypeError: it is no integer; 5.0, True and tensors are none. The message has the name.
        ValueError: it is less.
    """
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    found = operator.index(value)
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found
