"""Saving a method on gradients and going on with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..noise import NoiseStream
from .anchors import Anchors
from .contract import Clock, Rule
from .modalities import Modalities
from .state import State, check_saved, saved_method


class Resumes:
    """A mixin: `state_dict` and `load_state_dict` of a `GradientMethod`."""

    name: str
    rule: Rule
    modalities: Modalities
    anchors: Anchors | None
    stream: NoiseStream
    epoch: int
    _told: bool
    _clock: Clock
    _state: State
    _follow: Callable[[], None]
    _forget: Callable[[], None]
    _go_to: Callable[[int | None], None]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same numbers, also within an epoch.

        As with an optimizer the tensors are the object's own: save them, or copy them.
        """
        stream = self.stream if self.rule.need.stream else None
        anchors = None
        if self.anchors is not None:
            anchors = self.anchors.state_dict(self.modalities)
        epoch = self.epoch if self._told else None
        told = self.name, self.modalities.names, epoch, self._clock.step
        return saved_method(*told, self._state, stream, anchors)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: it is of another method or version, of other encoders or the same in another
                order, or an entry is missing or does not fit; nothing has been changed then.
        """
        need, anchored = self.rule.need, self.anchors is not None
        stream = self.stream if need.stream else None
        # These go by the places of modalities and parameters.
        placed = self._state or anchored or need.draws or need.noise is not None
        names = self.modalities.names if placed else ()
        check_saved(self.name, names, state_dict, self._state, stream, anchored)
        if self.anchors is not None:
            self.anchors.load_state_dict(state_dict["anchors"], self.modalities)
        self._follow()
        self._state.load(state_dict["state"])
        if stream is not None:
            self.stream.load_state_dict(state_dict["stream"])
        epoch = state_dict["epoch"]
        self._go_to(None if epoch is None else int(epoch))
        self._clock = Clock(self.epoch, int(state_dict["step"]))
        self._forget()
