"""What several micro-batches and several ranks have seen, as one number each.

Under data parallelism every rank sees its own part of the batch. The methods decide from the whole
of it, so that all ranks decide the same: sums over the samples are added up, on the device, over
the micro-batches of a step and then over the ranks, in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .._devices import WIDE
from ..ops.modality_scores import class_indices
from ..reference.modality_scores import IGNORED_LABEL
from ._together import reduce_together

if TYPE_CHECKING:
    from ..noise import NoiseStream

# None: all ranks of torch.distributed, where it is initialized. False: this rank alone.
Group = Union["dist.ProcessGroup", Literal[False], None]
_Of = TypeVar("_Of")
_AVAILABLE = dist.is_available()


def check_group(process_group: Group) -> Group:
    """Returns it.

    Raises:
        TypeError: it is neither a ProcessGroup nor None or False.
    """
    known = (dist.ProcessGroup,) if dist.is_available() else ()
    if process_group not in (None, False) and not isinstance(process_group, known):
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
        means: [K] means over the labelled samples.
        sums: [E] sums, if there are any.
        parts: What the only micro-batch has shown beside the means; None if there are several, or
            several ranks.
    """

    means: Tensor
    sums: Tensor | None
    _count: Tensor | None
    _labels: Tensor | None
    parts: Any = None

    @property
    def count(self) -> Tensor:
        """0-d number of labelled samples."""
        if self._count is None:
            assert self._labels is not None
            return _labelled(self._labels)
        return self._count


#: For rules that sense nothing.
NOTHING = Observed(torch.empty(0), None, None, None)


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
        self._latest: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._totals: Tensor | None = None
        self._error: Exception | None = None
        #: Whether there is nothing to take.
        self.empty = True

    def add(self, means: Tensor, labels: Tensor, sums: Tensor | None = None) -> None:
        """Adds one micro-batch: [K] means over the samples whose labels count, and [E] sums."""
        self._fold()
        self._latest = (means, labels, sums)
        self.empty = False

    def _fold(self) -> None:
        if self._latest is None:
            return
        totals = _totals(*self._latest)
        self._totals = totals if self._totals is None else self._totals + totals
        self._dtype, self._width = self._latest[0].dtype, len(self._latest[0])
        self._latest = None

    def fail(self, error: Exception) -> None:
        """Keeps why this rank cannot take part in the step, for `take` to raise on all ranks."""
        self._error = self._error or error
        self.empty = False

    def clear(self) -> None:
        """Forgets what has been added since the last step."""
        self._latest = self._totals = self._error = None
        self.empty = True

    def take(self, width: int = 0, device: torch.device | None = None) -> Observed:
        """The means over all that was added, on all ranks; a new step begins.

        Args:
            width: Numbers that every rank adds up, beside the count of samples; needed by a rank
                with an error, which may not have any.
            device: Where, likewise.

        Raises:
            RuntimeError: nothing was added, or another rank has an error.
            Exception: this rank's, if it has one.
        """
        if self.empty:
            raise RuntimeError(
                f"{self.method}.step: nothing was observed since the last step; pass logits and "
                "labels, or call observe(...) in every micro-batch"
            )
        group = several(self.process_group)
        if group is None and self._totals is None and self._latest is not None:
            means, labels, sums = self._latest
            self.clear()
            return Observed(means, sums, None, labels)
        self._fold()
        totals, error = self._totals, self._error
        self.clear()
        if error is not None:
            assert group is not None
            dtype = WIDE[torch.device(device or "cpu").type]
            totals = torch.full((width + 1,), torch.nan, dtype=dtype, device=device)
            reduce_together(totals, 0, error, group)
        assert totals is not None
        width = self._width
        if group is not None:
            reduce_together(totals, width, None, group)
        count = totals[width]
        sums = totals[width + 1 :]
        return Observed((totals[:width] / count).to(self._dtype), sums, count, None)


def _totals(means: Tensor, labels: Tensor, sums: Tensor | None) -> Tensor:
    """[K + 1 + E]: sums over the labelled samples, their number, other sums."""
    count, wide = _labelled(labels).to(means.device), WIDE[means.device.type]
    # The mean of no sample is NaN; as a sum it is 0.
    parts = [torch.where(count > 0, means.to(wide) * count, 0.0), count.to(wide).unsqueeze(0)]
    return torch.cat(parts if sums is None else [*parts, sums.to(wide)])


def _labelled(labels: Tensor) -> Tensor:
    """How many rows count: 0-d."""
    return (class_indices(labels) != IGNORED_LABEL).sum()


def over_ranks(
    look: Callable[[], tuple[_Of, Tensor, Tensor]],
    process_group: Group,
    width: int,
    device: torch.device,
) -> tuple[_Of, Tensor]:
    """Means over the labelled samples of all ranks, for methods without micro-batches.

    Args:
        look: Looks at this rank's samples; returns something, [K] means, and labels.
        process_group: The ranks.
        width: K.
        device: Where the means are.

    Raises:
        Exception: what `look` raises, here, and as a RuntimeError on the other ranks.
    """
    if several(process_group) is None:
        found, means, _ = look()
        return found, means
    observations = Observations("", process_group)
    looked: list[_Of] = []
    try:
        found, means, labels = look()
        looked.append(found)
        observations.add(means, labels)
    except Exception as error:
        observations.fail(error)
    means = observations.take(width, device).means
    return looked[0], means
