"""State: the small tensors of a method that outlive a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._devices import known, narrowed
from .._numbers import whole
from ..noise import NoiseStream, saved_state
from ..ops.keep_state import keep_checked_

#: The format of `state_dict`'s result; a state of another format is refused.
FORMAT = 1
#: The format of a module's state, whose entries are tensors. A module reads format 1, too.
MODULE_FORMAT = 2


class State(dict[str, Tensor]):
    """Named tensors of fixed shape on one device, changed in place only.

    Args:
        method: Whose state it is, for error texts.
        device: The device of the tensors.
        tensors: Their first values.
    """

    def __init__(
        self, method: str, device: torch.device, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(tensors or {})
        self.method = method
        #: Each tensor's dtype, if the device has it: float64 is float32 on one without.
        self._dtypes = {name: tensor.dtype for name, tensor in self.items()}
        self._move(device)

    def follow(self, device: torch.device) -> None:
        """Moves to where the encoders are now."""
        if self.device != device:
            self._move(device)

    def _move(self, device: torch.device) -> None:
        self.device = device
        for name, tensor in self.items():
            # Narrowed before it moves and widened after, for one of the devices may lack float64.
            moved = tensor.to(narrowed(tensor.dtype, device)).to(device)
            self[name] = moved.to(narrowed(self._dtypes[name], device))

    def set(
        self,
        new: Mapping[str, Tensor],
        counts: Tensor | None = None,
        sums: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Takes over new values, where the 0-d bool `counts` is true and all [T] `sums` are finite.

        Without `counts`, always.
        """
        if counts is None:
            for name, value in new.items():
                self[name].copy_(value)
        elif new:
            old = [self[name] for name in new]
            values = [new[name].to(kept).contiguous() for name, kept in zip(new, old, strict=True)]
            keep_checked_(backend, old, values, counts.to(self.device), sums)

    def check(self, saved: Mapping[str, Any]) -> None:
        """Checks that `saved` holds these tensors.

        Raises:
            ValueError: an entry is missing or has another shape; it is named.
        """
        _check_entries(self.method, saved, list(self))
        for name, tensor in self.items():
            loaded = saved[name]
            if not isinstance(loaded, Tensor) or loaded.shape != tensor.shape or _unlike(loaded):
                got = list(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
                raise ValueError(
                    f"{name!r} in the state of {self.method} must be a tensor of shape "
                    f"{list(tensor.shape)}, got {got}"
                )

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over the values."""
        for name, tensor in self.items():
            tensor.copy_(saved[name])


def check_format(
    method: str, saved: Mapping[str, Any], entries: Sequence[str], names: Sequence[str] = ()
) -> None:
    """Checks that a method's `state_dict` is one of this version, and holds these entries.

    Args:
        method: Whose it is, for error texts.
        saved: The state.
        entries: Names of entries that it must have.
        names: The encoders, whose order the state must have; none where it has no order. A state
            of before mmfuse saved them does not say which it has.

    Raises:
        ValueError: it is not, or does not.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict of {method} must be a mapping, got {type(saved).__name__}")
    found = saved.get("format")
    if (isinstance(found, Tensor) and found.dim()) or found != FORMAT:
        refuse_format(method, found, FORMAT)
    named = saved.get("method", method)
    if named != method:
        raise ValueError(f"this is the state of {named}, not of {method}")
    _check_entries(method, saved, entries)
    given, wanted = saved.get("modalities"), list(map(str, names))
    if not wanted or given is None:
        return
    if not isinstance(given, (list, tuple)):
        kind = type(given).__name__
        raise ValueError(f"'modalities' in the state of {method} must be a list, got {kind}")
    if list(given) != wanted:
        raise ValueError(
            f"the state of {method} is of encoders={list(given)}, in this order, but this {method} "
            f"has encoders={wanted}: make it with the encoders of the state, by the same names and "
            "in the same order"
        )


def refuse_format(method: str, found: object, known: int) -> NoReturn:
    """Raises a ValueError for a state of a format that is not the known one."""
    kind = "has no format number" if found is None else f"has format {found}"
    raise ValueError(
        f"the state of {method} {kind}, but this version of mmfuse reads format {known}: it was "
        "saved by another version; install that one to go on with it"
    )


def saved_as(method: str, names: Sequence[str]) -> dict[str, Any]:
    """The first entries of a `state_dict`: its format, whose it is, and of which encoders."""
    # Texts alone, which a reader of weights knows.
    return {"format": FORMAT, "method": method, "modalities": list(map(str, names))}


def saved_method(
    method: str,
    names: Sequence[str],
    epoch: int | None,
    step: int,
    state: State,
    stream: NoiseStream | None,
    anchors: dict[str, Any] | None,
) -> dict[str, Any]:
    """A method's `state_dict`; None stands for what it does not have."""
    found = saved_as(method, names) | {"epoch": epoch, "step": step, "state": dict(state)}
    if stream is not None:
        found["stream"] = stream.state_dict()
    if anchors is not None:
        found["anchors"] = anchors
    return found


def check_saved(
    method: str,
    names: Sequence[str],
    saved: Mapping[str, Any],
    state: State,
    stream: NoiseStream | None,
    anchored: bool,
) -> None:
    """Checks all but the anchors of what `saved_method` has returned; `names` as `check_format`.

    Raises:
        ValueError: something is missing or does not fit.
    """
    others = ["anchors"] * anchored + ["stream"] * (stream is not None)
    check_format(method, saved, ["epoch", "step", "state", *others], names)
    for name in ("epoch", "step"):
        if saved[name] is not None or name == "step":
            whole(f"{name!r} in the state of {method}", saved[name], least=0)
    if not isinstance(saved["state"], Mapping):
        kind = type(saved["state"]).__name__
        raise ValueError(f"'state' in the state of {method} must be a mapping, got {kind}")
    state.check(saved["state"])
    if stream is not None:
        saved_state(saved["stream"])


def _unlike(loaded: Tensor) -> bool:
    """True if the values of a saved tensor cannot be taken over."""
    return not known(loaded) or loaded.is_complex()


def _check_entries(method: str, saved: Mapping[str, Any], entries: Sequence[str]) -> None:
    missing = [name for name in entries if name not in saved]
    if missing:
        raise ValueError(f"the state of {method} lacks {missing}")
