"""Result: the fields of a step, by the names of the modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from .._devices import readable
from .scalars import scalars_of

#: Names of the entries of a vector that has others than one for each modality, by field.
Entries = Mapping[str, tuple[str, ...]]

# A longer tensor is shown by its shape.
_SHOWN = 16


@dataclass(frozen=True)
class Result:
    """The fields of a step; `repr` and `as_dict` show them by modality.

    A tensor of a result lies on the device, and nothing has waited for it: `repr` does, and so does
    ``.item()``.

    Attributes:
        modalities: Names of the M modalities, in the order of every [M] field.
    """

    modalities: tuple[str, ...] = field(default=(), kw_only=True, compare=False)

    entries: ClassVar[Entries] = {}

    def __init_subclass__(cls) -> None:
        # It is in the class itself, where @dataclass leaves it alone.
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def as_dict(self) -> dict[str, Tensor]:
        """Every [M] and 0-d field for a logger, by tags such as ``"coefficients/audio"``.

        ::

            run.log({tag: value.item() for tag, value in out.as_dict().items()})

        ``.item()`` waits for the device; `mmfuse.ScalarLog` logs every step without waiting.

        Returns:
            Tag → 0-d tensor that shares the result's memory; the numbers 0, 1, … stand for names
            that are not known.
        """
        return scalars_of(self)

    def __repr__(self) -> str:
        parts = []
        for f in fields(self):
            if f.name != "modalities":
                names = self.entries.get(f.name, self.modalities)
                parts.append(f"{f.name}={_shown(getattr(self, f.name), names)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def names_for(result: Any, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The argument that tells a result its names; a rule of the user's may return any dataclass."""
    named = isinstance(result, type) and issubclass(result, Result)
    return {"modalities": names} if named else {}


def method_text(method: Any, where: str, *more: str) -> str:
    """A method with encoders at the prompt: its rule, where and when it acts, its parameters."""
    window = f"starts={method.starts}, ends={method.ends}, epoch={method.epoch}"
    parts = [repr(method.rule), where, window, *more]
    modalities = method.modalities
    lines = [f"{type(method).__name__}({', '.join(parts)})"]
    for m, name in enumerate(modalities.names):
        own = [
            p for p, of in zip(modalities.parameters, modalities.modality, strict=True) if of == m
        ]
        numbers = sum(p.numel() for p in own)
        lines.append(f"  {name}: {numbers:,} parameters in {len(own)} tensor{'s'[: len(own) - 1]}")
    return "\n".join(lines)


def _shown(value: Any, names: tuple[str, ...]) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(v, ())}" for key, v in value.items()) + "}"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() > _SHOWN or not readable(value):
        return f"Tensor{list(value.shape)}"
    if value.dim() == 0:
        return _number(value.item())
    numbers = [_number(v) for v in value.tolist()] if value.dim() == 1 else []
    if len(numbers) == len(names) > 0:
        pairs = zip(names, numbers, strict=True)
        return "{" + ", ".join(f"{name}: {number}" for name, number in pairs) + "}"
    return "[" + ", ".join(numbers) + "]" if numbers else f"Tensor{list(value.shape)}"


def _number(value: float | bool) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
