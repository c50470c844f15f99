"""Methods that change the same gradients one after the other."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor

if TYPE_CHECKING:
    from .contract import Need
    from .gradients import GradientMethod

#: The latest change of gradients: whose it was, its name and what its rule needs, and the first
#: gradient with its version after it.
latest: tuple[ref[GradientMethod], str, Need, ref[Tensor], int] | None = None

_told: set[tuple[str, str]] = set()


def _is_factor(need: Need) -> bool:
    """True if a method only multiplies gradients, by numbers that do not depend on them."""
    return not need.stats and need.second is None and need.squares is None


def check(method: GradientMethod, first: Tensor | None, version: int) -> None:
    """Warns, once for two methods, if the latest change was of these gradients in this step.

    Two factors commute; what looks at the gradients, or adds to them, does not.
    """
    assert latest is not None
    _, before, need, changed, then = latest
    if first is None or changed() is not first or version != then:
        return
    pair = before, method.name
    if (_is_factor(need) and _is_factor(method.rule.need)) or pair in _told:
        return
    _told.add(pair)
    warnings.warn(
        f"{method.name} changes gradients that {before} has changed already in this step, and the "
        f"two do not commute: the order of the calls counts, and is {before}, then {method.name}",
        RuntimeWarning,
        stacklevel=4,
    )
