"""The modalities that a module's state is of, as a tensor: check sums of their names, in order.

A buffer has one entry for each bit of a sum: `_SET`, or 0. Averages over states, cut to integers,
keep that, also those that begin with a state without names; float16 and bfloat16 have it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Of a check sum, and the columns of the buffer.
BITS = 32
_SET = 2**15


def _sum_of(name: str) -> int:
    """FNV-1a of a name, alike in all processes; in plain Python, which torch.compile follows."""
    found = 2166136261
    for character in str(name):
        found = ((found ^ ord(character)) * 16777619) % 2**BITS
    return found or 1


def write_sums(buffer: Tensor, names: Iterable[str]) -> None:
    """Writes the names' check sums into [M, BITS]; nothing is copied from the host."""
    places = torch.arange(BITS, device=buffer.device)
    for row, name in zip(buffer.unbind(), names, strict=True):
        row.copy_(((_sum_of(name) >> places) & 1) * _SET)


def read_sums(saved: Tensor) -> tuple[int, ...] | None:
    """The check sums in a buffer, which the host waits for; None if nobody has written any."""
    bits = (saved > 0).tolist()
    found = tuple(sum(1 << place for place, bit in enumerate(row) if bit) for row in bits)
    return found if any(found) else None


def order_by(sums: Sequence[int], names: Iterable[str]) -> tuple[str, ...] | None:
    """The names in the order of check sums; None if these are of others."""
    known = {_sum_of(name): name for name in names}
    if sorted(known) != sorted(sums):
        return None
    return tuple([known[each] for each in sums])
