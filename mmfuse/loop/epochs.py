"""EpochWindow: which epoch it is, and in which of them a method acts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .._numbers import whole
from .state import FORMAT, check_format


class EpochWindow:
    """A mixin for methods that act from one epoch to another, both included."""

    starts: int
    ends: int | None
    #: The epoch that runs, counted from 0; 0 before `set_epoch`.
    epoch: int
    # Whether `set_epoch` has been called in this run.
    _told: bool
    _warned: bool

    def _set_window(self, starts: int, ends: int | None) -> None:
        """Begins in epoch 0.

        Raises:
            TypeError: `starts` or `ends` is no integer.
            ValueError: `ends` is before `starts`.
        """
        self.starts = whole("starts", starts)
        self.ends = None if ends is None else whole("ends", ends)
        if self.ends is not None and self.ends < self.starts:
            raise ValueError(f"ends={ends} is before starts={starts}")
        self.epoch = 0
        self._told = False
        self._warned = False

    @property
    def modulating(self) -> bool:
        """Whether the current epoch lies between `starts` and `ends`, both included."""
        return self.starts <= self.epoch and (self.ends is None or self.epoch <= self.ends)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, counted from 0; the same number again changes nothing.

        Raises:
            TypeError: it is no integer.
            ValueError: it is negative.
        """
        self.epoch = whole("epoch", epoch, least=0)
        self._told = True

    def begin(self) -> None:
        """Says that a new run begins: the next `set_epoch` begins its epoch whatever its number."""
        self.epoch = 0
        self._told = False

    def _check_told(self, method: str, needed: bool = False) -> None:
        """Warns once where a window was given, but no epoch.

        Raises:
            RuntimeError: `needed`, since anchors are taken with it, but no epoch was given.
        """
        if needed and not self._told:
            raise RuntimeError(
                f"{method}: call set_epoch(epoch) first, in every epoch; it copies the parameters "
                "that gradients are compared with"
            )
        if self._told or self._warned or (self.ends is None and self.starts == 0):
            return
        self._warned = True
        warnings.warn(
            f"{method} was made with starts={self.starts}, ends={self.ends}, but set_epoch was "
            "never called: every epoch counts as the first; call set_epoch(epoch) in each",
            RuntimeWarning,
            stacklevel=4,
        )


class EpochWindowModule(EpochWindow):
    """The same for a `torch.nn.Module`, whose state then holds the epoch."""

    _warned_of_mode = False

    def _check_told(self, method: str, needed: bool = False) -> None:
        """Also warns, once, where training goes on without gradients, as in an evaluation."""
        super()._check_told(method, needed)
        if torch.is_grad_enabled() or self._warned_of_mode or torch.compiler.is_compiling():
            return
        self._warned_of_mode = True
        warnings.warn(
            f"{method} is in training mode, but no gradients are recorded: if this is an "
            f"evaluation, model.eval() has not reached it; make {method} a submodule of the model "
            "(self.balance = ...), or call its own eval()",
            RuntimeWarning,
            stacklevel=4,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Format and epoch, which are no tensors: reading them must not wait for the device."""
        return {"format": FORMAT, "epoch": self.epoch if self._told else None}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Goes on in the epoch in which the state was taken.

        Raises:
            ValueError: the state is of another format.
        """
        check_format(type(self).__name__, state, ["epoch"])
        epoch = state["epoch"]
        self._told, self.epoch = epoch is not None, int(epoch or 0)
