"""The sense stage: what micro-batches show, over all of a step and over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..noise import NoiseStream
from .contract import Batch, Clock, Rule, Sensed, State
from .modalities import Modalities, given
from .ranks import Group, Observations, Observed, several


class Senses:
    """Collects what a rule senses, until the step takes it.

    Args:
        method: Whose they are, for error texts.
        rule: What senses.
        modalities: The encoders.
        process_group: The ranks to average over.
        backend: Name of a backend; None for the best one.
    """

    def __init__(
        self,
        method: str,
        rule: Rule,
        modalities: Modalities,
        process_group: Group,
        backend: str | None,
    ) -> None:
        self._rule = rule
        self._modalities = modalities
        self._process_group = process_group
        self._backend = backend
        self._observations = Observations(method, process_group)
        self._rows = 0  # of this step's earlier micro-batches

    def __call__(
        self,
        state: State,
        stream: NoiseStream,
        clock: Clock,
        logits: Mapping[str, Tensor],
        labels: Tensor | None,
        features: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> Sensed:
        """Looks at one micro-batch.

        Raises:
            TypeError: something that the rule needs is missing.
            ValueError: names do not fit.
        """
        more, needed = {"features": features, "inputs": inputs}, self._rule.need.inputs
        if needed and (labels is None or any(more[name] is None for name in needed)):
            every = ", ".join(["logits", "labels", *needed[:-1]])
            raise TypeError(f"{every} and {needed[-1]} go together: give all or none")
        batch = Batch(
            logits,
            given(labels),
            {name: self._modalities.ordered(name, more[name] or {}) for name in needed},
            self._modalities,
            state,
            clock,
            stream,
            self._process_group,
            self._rows,
            self._backend,
        )
        return self._rule.sense(batch)

    def add(self, state: State, sensed: Sensed, labels: Tensor) -> None:
        """Keeps a micro-batch for the step."""
        self._observations.add(sensed.means, labels, self._rule.sums(sensed, state))
        self._rows += sensed.rows

    def take(self, state: State, sensed: Sensed | None, labels: Tensor | None) -> Observed:
        """Everything since the last step; the last micro-batch may still be new.

        Raises:
            RuntimeError: there is nothing.
        """
        if sensed is not None and labels is not None:
            if not self._observations and several(self._process_group) is None:
                return Observed(sensed.means, None, None, labels, sensed.parts)
            self.add(state, sensed, labels)
        self._rows = 0
        return self._observations.take()

    def clear(self) -> None:
        """Forgets what has been seen since the last step."""
        self._observations.clear()
        self._rows = 0
