"""Everything that is fuzzed, by name; what has no driver is named too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from hypothesis import strategies as st

import mmfuse
from mmfuse import METHODS, amp, ops, scores

from .calls import Function
from .drivers import DRIVERS
from .machines import SEQUENCES, Sequence
from .public import FUNCTIONS, of_method

#: Ops whose result is no number that backends could differ in.
NO_RESULT = ("active_backend", "use_backend")


class Target(Protocol):
    """The attributes and methods of each target that `program.py` uses."""

    name: str

    def calls(self) -> st.SearchStrategy[Any]: ...

    def judge(self, call: Any) -> None: ...

    def describe(self, call: Any) -> str: ...


def _is_result(value: Any) -> bool:
    """Records of results and of options, which check nothing."""
    return inspect.isclass(value) and (
        hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")
    )


def public() -> dict[str, Callable[..., Any]]:
    """Every public function and class, by its name in `mmfuse`."""
    found: dict[str, Callable[..., Any]] = {}
    listed = [name for name in dir(mmfuse) if not name.startswith("_")]
    spaces = {"": (mmfuse, listed), "ops.": (ops, ops.__all__)}
    spaces["scores."] = (scores, scores.__all__)
    own = [n for n, f in vars(amp).items() if getattr(f, "__module__", "") == amp.__name__]
    own = [name for name in own if not name.startswith("_")]
    spaces["amp."] = (amp, own)
    for prefix, (module, names) in spaces.items():
        for name in names:
            value = getattr(module, name)
            if callable(value) and not _is_result(value):
                found[prefix + name] = value
    del found["use_backend"]  # ops.use_backend
    del found["GradientMethod"]  # what methods on gradients are made of
    return found


def _combined(tasks: list[Any], weights: Any = None) -> Any:
    # Python refuses what it cannot spread into arguments before mmfuse is asked.
    given = tasks if isinstance(tasks, (list, tuple)) else [tasks]
    return scores.combined(*given, weights=weights)


def targets() -> dict[str, Target]:
    """All of them.

    Raises:
        LookupError: something public has no driver.
    """
    found: dict[str, Target] = {}
    for name, function in public().items():
        if name in METHODS:
            found[name] = Function(name, function, of_method(function), compared=False)
        elif name.startswith("ops.") and name[4:] in DRIVERS:
            compared = name[4:] not in NO_RESULT
            found[name] = Function(name, function, DRIVERS[name[4:]], compared)
        elif name in FUNCTIONS:
            own = _combined if name == "scores.combined" else function
            compared = "backend" in inspect.signature(function).parameters
            found[name] = Function(name, own, FUNCTIONS[name], compared)
        else:
            raise LookupError(f"tests/support/fuzzing has no driver for {name}")
    for kind in SEQUENCES:
        found[f"steps of {kind}"] = Sequence(kind)
    return found
