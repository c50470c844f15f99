"""Errors that one rank has to tell the others, which would wait for it in a collective for ever.

A rank that cannot take part in a step sends NaN in the all-reduce that the step has anyway, and
then every rank raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The first number of the last all-reduce on a GPU, on the host, and the event that it is there.
_late: list[tuple[Tensor, Any]] = []


def reduce_together(
    totals: Tensor, count: int, error: Exception | None, group: dist.ProcessGroup
) -> None:
    """Adds `totals` up over the ranks, in place; raises on all of them if one has an error.

    On the CPU this very call raises. On a GPU the host would have to wait for the sum; there the
    rank with the error raises at once, and the others in the call after, if they come to it.

    Args:
        totals: Sums; NaN from a rank with an error.
        count: The place among them of the one that is never NaN otherwise.
        error: This rank's.
        group: The ranks.

    Raises:
        RuntimeError: another rank has an error; it says which, and what.
    """
    _raise_late()
    dist.all_reduce(totals, group=group)
    if torch.compiler.is_dynamo_compiling():  # reading a number would break the graph
        if error is not None:
            raise error
        return
    if totals.device.type == "cpu":
        if error is not None or totals[count].isnan():
            _raise_all(error, group)
    elif error is not None:
        raise error
    elif totals.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        number = torch.empty(1, dtype=totals.dtype, pin_memory=True)
        number.copy_(totals[count : count + 1], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _late[:] = [(number, event)]


def _raise_late() -> None:
    """Raises what an earlier all-reduce on a GPU has shown, if that is known by now."""
    if not _late or torch.compiler.is_dynamo_compiling() or not _late[0][1].query():
        return
    number, _ = _late.pop()
    if number.isnan():
        raise RuntimeError(
            "another rank could not take part in an earlier step of mmfuse; its own error says why"
        )


def _raise_all(error: Exception | None, group: dist.ProcessGroup) -> None:
    texts: list[str | None] = [None] * group.size()
    mine = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(texts, mine, group=group)
    if error is not None:
        raise error
    rank, text = next((r, text) for r, text in enumerate(texts) if text is not None)
    raise RuntimeError(f"rank {rank} cannot take this step, so that no rank takes it: {text}")


def check_one_order(names: Sequence[str], device: torch.device, group: dist.ProcessGroup) -> None:
    """Checks that all ranks have the same modalities in one order; waits for the device.

    Args:
        names: Those of this rank.
        device: The device on which the ranks compare.
        group: The ranks.

    Raises:
        ValueError: they do not; on all ranks.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    digest = hashlib.blake2b(repr(list(map(str, names))).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    if len(set(torch.cat(found).tolist())) > 1:
        raise ValueError(other_order(names, group))


def other_order(names: Sequence[str], group: dist.ProcessGroup) -> str:
    """The text of the error that it raises."""
    return (
        "the ranks have other modalities, or the same ones in another order, by which numbers are "
        f"averaged; rank {group.rank()} has {list(names)}. A set has another order in each "
        "process: make the dict of encoders or features in one order, as with sorted(...)"
    )
