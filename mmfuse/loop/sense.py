"""The sense stage: what micro-batches show, over all of a step and over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE
from ..noise import NoiseStream
from ..ops._eager import Eager
from .contract import Batch, Clock, Rule, Sensed, State
from .modalities import Modalities
from .ranks import Group, Observations, Observed, agree, several


def warn_of_probabilities(logits: Mapping[str, Tensor]) -> None:
    """Warns of logits on the CPU, where looking waits for nothing, that look like probabilities."""
    for name, z in logits.items() if isinstance(logits, Mapping) else ():
        if not isinstance(z, Tensor) or z.device.type != "cpu" or z.dim() != 2 or z.shape[1] < 2:
            continue
        sums = z.detach().to(WIDE[z.device.type]).sum(1)
        if z.numel() and bool((z >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
            warnings.warn(
                f"logits[{name!r}] look like probabilities: no number is negative, and every row "
                "adds up to 1; give what comes before the softmax",
                RuntimeWarning,
                stacklevel=5,
            )


_NOTHING_MORE: dict[str, list[Tensor]] = {}


class Senses:
    """Collects what a rule senses, until the step takes it.

    Args:
        method: Whose they are, for error texts.
        rule: What senses.
        modalities: The encoders.
        process_group: The ranks to average over.
    """

    def __init__(
        self, method: str, rule: Rule, modalities: Modalities, process_group: Group
    ) -> None:
        self._rule = rule
        self._needed = rule.need.inputs
        self._modalities = modalities
        self._process_group = process_group
        self._observations = Observations(method, process_group)
        self._rows = 0  # of this step's earlier micro-batches
        self._looked = False

    def __call__(
        self,
        state: State,
        stream: NoiseStream,
        clock: Clock,
        backend: str | None,
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
        more = self._given(labels, features, inputs) if self._needed else _NOTHING_MORE
        if labels is None:
            raise TypeError("logits and labels go together: give both or neither")
        if not self._looked and type(backend) is Eager:
            self._looked = True
            warn_of_probabilities(logits)
        batch = Batch(
            logits,
            labels,
            more,
            self._modalities,
            state,
            clock,
            stream,
            self._process_group,
            self._rows,
            backend,
        )
        return self._rule.sense(batch)

    def _given(
        self,
        labels: Tensor | None,
        features: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> dict[str, list[Tensor]]:
        """The further inputs that the rule needs, in the order of the modalities."""
        more, needed = {"features": features, "inputs": inputs}, self._needed
        if labels is None or any(more[name] is None for name in needed):
            every = ", ".join(["logits", "labels", *needed[:-1]])
            raise TypeError(f"{every} and {needed[-1]} go together: give all or none")
        return {name: self._modalities.ordered(name, more[name] or {}) for name in needed}

    def add(self, state: State, sensed: Sensed, labels: Tensor) -> None:
        """Keeps a micro-batch for the step."""
        self._observations.add(sensed.means, labels, self._rule.sums(sensed, state))
        self._rows += sensed.rows

    def keeps(self, error: Exception, stream: NoiseStream) -> bool:
        """Whether `take` will raise this error, on all ranks; not where this rank is alone.

        The others go on to their next collective, and so has this rank to.
        """
        if several(self._process_group) is None:
            return False
        if self._rule.need.draws:
            agree(stream, self._process_group)
        self._observations.fail(error)
        return True

    def take(
        self,
        state: State,
        sensed: Sensed | None,
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Observed:
        """Everything since the last step; the last micro-batch may still be new.

        Args:
            state: The rule's.
            sensed: Of the last micro-batch, if it is new.
            labels: Of the same.
            group: The ranks, if there are several.

        Raises:
            RuntimeError: there is nothing, or another rank has an error.
            Exception: this rank's that `keeps` has got.
        """
        if sensed is not None and labels is not None:
            if group is None and self._observations.empty:
                return Observed(sensed.means, None, None, labels, sensed.parts)
            self.add(state, sensed, labels)
        self._rows = 0
        width = self._rule.width(len(self._modalities.names))
        return self._observations.take(width, self._modalities.device)

    def clear(self) -> None:
        """Forgets what has been seen since the last step."""
        self._observations.clear()
        self._rows = 0
