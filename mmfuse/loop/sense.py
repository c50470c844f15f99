"""The sense stage: the numbers of micro-batches, over all of a step and over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE
from ..noise import NoiseStream
from ..ops._eager import Eager
from ..ops._tensors import why_unsupported
from ..ops.modality_scores import named_scores
from .contract import Batch, Clock, Rule, State
from .given import Kind, Looked, Loss, More, anywhere, check_present, look, makes_tables
from .modalities import Modalities
from .ranks import Group, Observations, Observed, agree, over_ranks, several


def warn_of_probabilities(logits: Mapping[str, Tensor]) -> None:
    """Warns of logits on the CPU, where looking waits for nothing, that look like probabilities."""
    for name, z in logits.items() if isinstance(logits, Mapping) else ():
        if not isinstance(z, Tensor) or z.device.type != "cpu" or z.dim() != 2 or z.shape[1] < 2:
            continue
        if why_unsupported(z) is not None:  # a method that needs them refuses them
            continue
        sums = z.detach().to(WIDE[z.device.type]).sum(1)
        if z.numel() and bool((z >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
            warnings.warn(
                f"logits[{name!r}] look like probabilities: no number is negative, and every row "
                "adds up to 1; give the logits before the softmax",
                RuntimeWarning,
                stacklevel=5,
            )


_NOBODY: frozenset[str] = frozenset()
_NOTHING_MORE: dict[str, list[Tensor]] = {}
_NO_SCORES: tuple[Literal["ratios", "coefficients"], ...] = ("ratios", "coefficients")


class Senses:
    """Collects what a rule senses, until the step takes it.

    Args:
        method: Whose they are, for error texts.
        rule: The rule that senses.
        modalities: The encoders.
        process_group: The ranks to average over.
        criterion: The loss that the labels are for.
    """

    def __init__(
        self,
        method: str,
        rule: Rule,
        modalities: Modalities,
        process_group: Group,
        criterion: Loss = None,
    ) -> None:
        self._rule = rule
        self._method = method
        self._needed = rule.need.inputs
        self._accuracy = rule.need.accuracy
        self._modalities = modalities
        self._process_group = process_group
        self._criterion = criterion
        self._observations = Observations(method, process_group)
        self._rows = 0  # of this step's earlier micro-batches
        self._looked = False
        self._paired = False  # whether the latest batch was to give tables
        self._kind: Kind = "scores"
        #: Modalities of which this step's batches may have had no sample.
        self.missing: frozenset[str] = _NOBODY

    def __call__(
        self,
        state: State,
        stream: NoiseStream,
        clock: Clock,
        backend: str | None,
        logits: Mapping[str, Tensor] | None,
        labels: Tensor | None,
        features: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Tensor] | None,
        more: More | None = None,
    ) -> Observed:
        """Looks at one micro-batch.

        Raises:
            TypeError: something that the rule needs is missing.
            ValueError: names do not fit.
        """
        mask = None
        if more or self._criterion is not None or self._accuracy:
            looked = self._look(more or {}, logits, labels, backend)
            if looked.scores is None:
                return Observed(looked.numbers, looked.weight, kind=looked.kind)
            scores, mask = looked.scores, looked.known if len(looked.numbers) == 0 else None
            given = self._given(labels, features, inputs) if self._needed else _NOTHING_MORE
        else:
            self._paired, self._kind, self.missing = False, "scores", _NOBODY
            given = self._given(labels, features, inputs) if self._needed else _NOTHING_MORE
            if logits is None or labels is None:
                raise TypeError("logits and labels go together: give both or neither")
            if not self._looked and type(backend) is Eager:
                self._looked = True
                warn_of_probabilities(logits)
            modalities = self._modalities
            each = modalities.ordered("logits", logits)
            scores = named_scores(modalities.logits_names, each, labels, backend)
        batch = Batch(
            scores,
            given,
            self._modalities,
            state,
            clock,
            stream,
            self._process_group,
            self._rows,
            mask,
            backend,
        )
        sensed = self._rule.sense(batch)
        return Observed(sensed.means, scores.count, None, sensed, "scores", scores.count.dim() == 1)

    def _look(
        self,
        more: More,
        logits: Mapping[str, Tensor] | None,
        labels: Tensor | None,
        backend: str | None,
    ) -> Looked:
        """Scores where there is more than logits and labels; or the user's numbers."""
        modalities = self._modalities
        self._kind = next((kind for kind in _NO_SCORES if more.get(kind) is not None), "scores")
        self._paired = makes_tables(more)
        if self._kind != "scores":
            self._rule.check_takes(self._kind)
        found = look(
            modalities.names,
            modalities.logits_names,
            logits,
            labels,
            more,
            self._criterion,
            modalities.device,
            backend,
            self._accuracy,
        )
        known = found.known
        self.missing = _NOBODY if known is None else self._without_samples(known)
        return found

    def _without_samples(self, mask: Tensor) -> frozenset[str]:
        """Those without a sample in this and in this step's other micro-batches, as far as known.

        If reading the mask would wait for the device, it may be any of them.
        """
        names = frozenset(self._modalities.names)
        if mask.device.type == "cpu" and not torch.compiler.is_dynamo_compiling():
            seen = mask.any(1).tolist()
            names -= {n for n, s in zip(self._modalities.names, seen, strict=True) if s}
        return names if self._observations.empty else names & self.missing

    def who(self, present: Mapping[str, Tensor] | None) -> Observed | None:
        """[M], above 0 for the modalities that a sample of some rank has; None if all have all.

        For rules that sense nothing else.

        Raises:
            TypeError: a mask is no bool tensor.
            ValueError: names, lengths or devices do not fit.
        """
        if present is None:
            return None
        names, device = self._modalities.names, self._modalities.device

        def look() -> tuple[None, Observed]:
            masks = present.values() if isinstance(present, Mapping) else ()
            rows = next((len(x) for x in masks if isinstance(x, Tensor) and x.dim()), 0)
            mask = check_present(names, present, rows, device)
            self.missing = self._without_samples(mask)
            return None, anywhere(mask)

        return over_ranks(look, self._process_group, len(names) + 1, device)[1]

    def _given(
        self,
        labels: Tensor | None,
        features: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Tensor] | None,
    ) -> dict[str, list[Tensor]]:
        """The further inputs that the rule needs, in the order of the modalities."""
        more, needed = {"features": features, "inputs": inputs}, self._needed
        if any(more[name] is None for name in needed):
            every = ", ".join(["logits", "labels", *needed[:-1]])
            raise TypeError(f"{every} and {needed[-1]} go together: give all or none")
        return {name: self._modalities.ordered(name, more[name] or {}) for name in needed}

    def add(self, state: State, seen: Observed) -> None:
        """Keeps a micro-batch for the step."""
        sensed = seen.parts
        if sensed is not None:
            seen = replace(seen, sums=self._rule.sums(sensed, state), parts=None)
        self._observations.add(seen)
        if sensed is not None:  # only once nothing can fail
            self._rows += sensed.rows

    def check(self, seen: Observed) -> None:
        """Raises a TypeError for a micro-batch that cannot be added to this step's others."""
        if several(self._process_group) is None:  # or the others would wait for this rank
            self._observations.check(seen)

    def keeps(self, error: Exception, stream: NoiseStream) -> bool:
        """True if `take` will raise this error on all ranks; False if this rank is alone.

        The others go on to their next collective, and so has this rank to.
        """
        if several(self._process_group) is None:
            return False
        if self._rule.need.draws:
            agree(stream, self._process_group)
        self._observations.fail(error)
        return True

    def _width(self) -> int:
        """How many numbers every rank adds up: means, counts, and sums beside."""
        count = len(self._modalities.names)
        if self._kind != "scores":
            return 2 * count
        columns = count if self._paired else 1
        means = self._rule.need.means * count * columns
        return means + (count * count if self._paired else 1) + self._rule.width(count)

    def take(
        self, state: State, seen: Observed | None, group: dist.ProcessGroup | None
    ) -> Observed:
        """Everything since the last step; the last micro-batch may still be new.

        Args:
            state: The rule's.
            seen: The last micro-batch, if it is new.
            group: The ranks, if there are several.

        Raises:
            RuntimeError: there is nothing, or another rank has an error.
            Exception: this rank's that `keeps` has got.
        """
        if group is not None:
            self._modalities.check_ranks(group)
        if seen is not None:
            if group is None and self._observations.empty:
                if seen.parts is not None:
                    seen.parts = seen.parts.parts
                self.missing = _NOBODY
                return seen
            self.add(state, seen)
        self._rows, self.missing = 0, _NOBODY
        return self._observations.take(self._width(), self._modalities.device)

    @property
    def pending(self) -> bool:
        """True if something was seen since the last step."""
        return not self._observations.empty

    def kept(self) -> tuple[Any, ...]:
        """All that has been seen since the last step, for `restore`."""
        return self._observations.kept(), self._rows, self.missing

    def restore(self, kept: tuple[Any, ...]) -> None:
        """Forgets what has been seen after `kept`."""
        seen, self._rows, self.missing = kept
        self._observations.restore(seen)

    def clear(self) -> None:
        """Forgets what has been seen since the last step."""
        self._observations.clear()
        self._rows, self.missing = 0, _NOBODY
