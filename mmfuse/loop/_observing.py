"""Micro-batches: the scores that a method on gradients collects until its step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..noise import NoiseStream
from .contract import Clock
from .given import More
from .ranks import Observed
from .sense import Senses
from .state import State

if TYPE_CHECKING:
    from .modalities import Modalities


class Observes:
    """A mixin: `observe` and `forget` of a `GradientMethod`."""

    name: str
    stream: NoiseStream
    backend: str | None
    modalities: Modalities
    _clock: Clock
    _senses: Senses
    _state: State
    _follow: Callable[[], None]
    _check_ready: Callable[..., None]
    _warned_of_mode = False
    _warned_of_pending = False

    def observe(
        self,
        logits: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        **more: Unpack[More],
    ) -> None:
        """Collects one micro-batch's scores; `step` then uses all since the last step.

        Call it in training only: a batch that is observed in an evaluation counts in the next step
        as well. It warns of that, once, if no gradients are recorded.

        Args:
            logits: Name → [B, C] logits of each modality alone (see `mmfuse.unimodal_logits`), or
                [B, C, …], or as `criterion` takes them; None with numbers of your own.
            labels: [B] integer class indices, or [B, …], or as `criterion` takes them. Rows
                labelled with its `ignore_index` (−100) do not count.
            features: Name → [B, …] features, for methods that need them; others ignore them.
            inputs: Name → input of each encoder, likewise.
            **more: ``present``, ``scores``, ``ratios``, ``coefficients``, ``count``, as
                `GradientMethod` describes them.

        Raises:
            RuntimeError: `set_epoch` was not called, for methods with anchors.
            TypeError: logits or labels have an unsupported type, or something is missing.
            ValueError: names, shapes or labels do not fit. With several ranks `step` raises what
                this rank has found wrong in a batch, so that all of them stop.
        """
        self._check_ready(one_list=True)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_mode()
        with torch.no_grad():
            seen = self._sense(logits, labels, features, inputs, more)
            if seen is not None:
                self._senses.add(self._state, seen)

    def forget(self) -> None:
        """Forgets the micro-batches that were observed since the last step.

        For an accumulation that is given up: one that an epoch's end or an exception has cut short,
        or batches that were observed by mistake. Their gradients are yours: call ``zero_grad()``.

        It also forgets what the last step has left in the gradients. Call it before `step` where
        new gradients come into the same memory without PyTorch's knowledge: by a replayed CUDA
        graph of the backward pass alone, or by ``p.grad.data``.
        """
        self._senses.clear()
        self.modalities.guard.marks = None

    def _sense(self, *given: Any) -> Observed | None:
        """None for an error that the step will raise on all ranks."""
        self._follow()
        try:
            return self._senses(self._state, self.stream, self._clock, self.backend, *given)
        except Exception as error:
            if not self._senses.keeps(error, self.stream):
                raise
            return None

    def _warn_of_mode(self) -> None:
        """Warns, once, of what may be an evaluation that shares its code with the training."""
        if self._warned_of_mode:
            return
        self._warned_of_mode = True
        warnings.warn(
            f"{self.name}.observe was called where no gradients are recorded: if this is an "
            f"evaluation, do not call it there, since the next {self.name}.step uses what it has "
            "seen (forget() drops that); in training, call it outside of torch.no_grad()",
            RuntimeWarning,
            stacklevel=3,
        )

    def _warn_of_pending(self) -> None:
        """Warns, once, of micro-batches that an epoch before the one that begins has left."""
        if not self._senses.pending or self._warned_of_pending:
            return
        self._warned_of_pending = True
        # They are not dropped: their gradients may wait in p.grad, and then belong to this step.
        warnings.warn(
            f"{self.name}: micro-batches that were observed before this epoch wait for a step, and "
            "count in its first one. Call step() after an epoch's last micro-batch; or, to drop "
            "them, zero_grad() and forget()",
            RuntimeWarning,
            stacklevel=4,
        )
