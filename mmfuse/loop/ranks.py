"""Observations of several micro-batches and several ranks, as one number each.

Under data parallelism every rank sees its own part of the batch. The methods decide from the whole
of it, so that all ranks decide the same: sums over the samples are added up, on the device, over
the micro-batches of a step and then over the ranks, in one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE
from ._together import reduce_together

if TYPE_CHECKING:
    from ..noise import NoiseStream
    from .given import Kind

# None: all ranks of torch.distributed, where it is initialized. False: this rank alone.
Group = Union["dist.ProcessGroup", Literal[False], None]
_Of = TypeVar("_Of")
_AVAILABLE = dist.is_available()


def no_replicas(method: str) -> RuntimeError:
    """The error of a module that nn.DataParallel copies, in threads, for a single batch."""
    return RuntimeError(
        f"{method} cannot train in torch.nn.DataParallel, which makes new copies of the model for "
        "every batch: their random streams and averages would be lost; use "
        "torch.nn.parallel.DistributedDataParallel"
    )


def check_group(process_group: Group) -> Group:
    """Returns it.

    Raises:
        TypeError: it is neither a ProcessGroup nor None or False.
    """
    known = (dist.ProcessGroup,) if dist.is_available() else ()
    none = process_group is None or process_group is False
    if not none and not isinstance(process_group, known):
        raise TypeError(
            "process_group must be a ProcessGroup, None (all ranks) or False (this rank alone), "
            f"got {type(process_group).__name__}"
        )
    return process_group


def several(process_group: Group) -> dist.ProcessGroup | None:
    """The group to reduce over, or None where this rank is alone."""
    if process_group is False or not _AVAILABLE:
        return None
    world = dist.group.WORLD  # None until torch.distributed is initialized
    group = world if process_group is None else process_group
    return None if world is None or group is None or group.size() == 1 else group


def rank_and_size(process_group: Group) -> tuple[int, int]:
    """This rank's number in the group and the group's size; (0, 1) where it is alone."""
    group = several(process_group)
    return (0, 1) if group is None else (group.rank(), group.size())


def agree(stream: NoiseStream, process_group: Group) -> None:
    """Takes over the first rank's seed and step, once: ranks often seed PyTorch differently."""
    group = several(process_group)
    if group is not None and not stream.agreed:
        dist.broadcast(stream.state, group=group, group_src=0)
        stream.agreed = True


@dataclass(slots=True)
class Observed:
    """Means and sums over all samples of a step.

    Attributes:
        means: [K] means: over the samples that count, or K/M² tables one after the other (see
            `mmfuse.loop.pairs`).
        count: 0-d number of samples, or their sum of weights; [M·M] for tables, [M] for numbers of
            the user's.
        sums: [E] sums, if there are any.
        parts: Other values of the only micro-batch, beside the means; None if there are several, or
            several ranks.
        kind: "scores", or of which kind the user's own numbers are; these are [M] then.
        paired: True if the means are tables.
    """

    means: Tensor
    count: Tensor
    sums: Tensor | None = None
    parts: Any = None
    kind: Kind = "scores"
    paired: bool = False

    def tables(self) -> Tensor:
        """[K/M², M, M] from means that are tables."""
        return self.means.view(-1, *[math.isqrt(len(self.count))] * 2)


#: The observation of rules that sense nothing.
NOTHING = Observed(torch.empty(0), torch.empty(()))


class Observations:
    """Collects what the micro-batches of a step have seen, until the step takes it.

    With one micro-batch on one rank the means come back as they were given.

    Args:
        method: Whose they are, for error texts.
        process_group: The ranks to average over.
    """

    def __init__(self, method: str, process_group: Group) -> None:
        self.method = method
        self.process_group = check_group(process_group)
        self._totals: Tensor | None = None
        self._error: Exception | None = None
        self._last: Observed = NOTHING
        #: True if there is nothing to take.
        self.empty: bool = True

    def check(self, seen: Observed) -> None:
        """Raises a TypeError for a micro-batch of another kind than earlier ones of the step."""
        last = self._last
        if not self.empty and (last.kind, last.paired) != (seen.kind, seen.paired):
            raise TypeError(
                f"{self.method}: this micro-batch has {_form(seen)}, those before it have "
                f"{_form(last)}; all of a step (and all ranks) must be given the same"
            )

    def add(self, seen: Observed) -> None:
        """Adds what one micro-batch has shown.

        Raises:
            TypeError: it is of another kind than what earlier ones have shown.
        """
        last = self._last
        if self._error is not None:
            return
        self.check(seen)
        if self.empty:
            self._totals = None
        elif self._totals is None:
            self._totals = _totals(last)
        if self._totals is not None:
            self._totals = self._totals + _totals(seen)
        self._last = seen
        self.empty = False

    def fail(self, error: Exception) -> None:
        """Keeps why this rank cannot take part in the step, for `take` to raise on all ranks."""
        self._error = self._error or error
        self.empty = False

    def kept(self) -> tuple[Any, ...]:
        """All that has been added since the last step, for `restore`."""
        return self._totals, self._error, self._last, self.empty

    def restore(self, kept: tuple[Any, ...]) -> None:
        """Forgets what has been added after `kept`."""
        self._totals, self._error, self._last, self.empty = kept

    def clear(self) -> None:
        """Forgets what has been added since the last step."""
        self._totals = self._error = None
        self._last = NOTHING
        self.empty = True

    def take(self, width: int = 0, device: torch.device | None = None) -> Observed:
        """The means over all that was added, on all ranks; a new step begins.

        Args:
            width: Numbers that every rank adds up; needed by a rank with an error, which may not
                have any.
            device: The device of the numbers, likewise.

        Raises:
            RuntimeError: nothing was added, on this or on another rank, or that has an error.
            Exception: this rank's, if it has one.
        """
        group = several(self.process_group)
        if self.empty:
            nothing = RuntimeError(
                f"{self.method}.step: nothing was observed since the last step; pass logits and "
                "labels, or call observe(...) in every micro-batch"
            )
            if group is None:
                raise nothing
            self.fail(nothing)  # the other ranks may have observed something, and wait
        totals, error, last = self._totals, self._error, self._last
        self.clear()
        if group is None and totals is None:
            return last
        if error is not None:
            assert group is not None
            dtype = WIDE[torch.device(device or "cpu").type]
            totals = torch.full((width,), torch.nan, dtype=dtype, device=device)
            reduce_together(totals, 0, error, group)
        if totals is None:
            totals = _totals(last)
        means, counts = len(last.means), last.count.numel()
        if group is not None:
            reduce_together(totals, means, None, group)
        sums, count, more = totals[:means], totals[means : means + counts], totals[means + counts :]
        # Tables share their counts, [M·M], row by row.
        found = (sums.view(-1, counts) / count).view(-1).to(last.means.dtype)
        count = count.view(last.count.shape)
        return Observed(found, count, more, None, last.kind, last.paired)


def _form(seen: Observed) -> str:
    if seen.kind != "scores":
        return f"{seen.kind}="
    return "present= or scores=" if seen.paired else "logits and labels alone"


def _totals(seen: Observed) -> Tensor:
    """[K + 1 + E]: sums over the samples, their number, other sums; or [K + M·M + E]."""
    wide = WIDE[seen.means.device.type]
    means = seen.means.to(wide)
    count = seen.count.to(means).view(-1)
    # The mean of no sample is NaN; as a sum it is 0.
    sums = torch.where(count > 0, means.view(-1, len(count)) * count, 0.0).view(-1)
    parts = [sums, count]
    return torch.cat(parts if seen.sums is None else [*parts, seen.sums.to(wide)])


def over_ranks(
    look: Callable[[], tuple[_Of, Observed]],
    process_group: Group,
    width: int,
    device: torch.device,
) -> tuple[_Of, Observed]:
    """Means over the samples of all ranks, for methods without micro-batches.

    Args:
        look: Looks at this rank's samples; returns something, and what they show.
        process_group: The ranks.
        width: How many numbers the ranks add up.
        device: The device of the numbers.

    Raises:
        Exception: what `look` raises, here, and as a RuntimeError on the other ranks.
    """
    if several(process_group) is None:
        return look()
    observations = Observations("", process_group)
    looked: list[_Of] = []
    try:
        found, seen = look()
        looked.append(found)
        observations.add(seen)
    except Exception as error:
        observations.fail(error)
    seen = observations.take(width, device)
    return looked[0], seen
