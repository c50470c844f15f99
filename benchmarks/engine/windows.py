"""Windows of every tensor, in which updates are compared, and the stream's noise in all of them.

On a GPU what counts is the launches, so the noise of all windows is formed at once.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfuse.reference import noise as reference_noise

from .inputs import SEED

_WINDOWS = 2**17
#: Tensor, start, end.
Window = tuple[int, int, int]


def windows(sizes: Sequence[int]) -> list[Window]:
    """(tensor, start, end): both ends of every tensor and a place between, chosen at random."""
    pick = random.Random(SEED)
    length = max(256, _WINDOWS // (3 * len(sizes)))
    places = []
    for t, size in enumerate(sizes):
        if size <= 3 * length:
            places.append((t, 0, size))
            continue
        middle = pick.randrange(length, size - 2 * length)
        places += [(t, s, s + length) for s in (0, middle, size - length)]
    return places


def standard_normals(state: Tensor, places: Sequence[Window]) -> list[Tensor]:
    """The reference's `standard_normal` of all windows, in as many launches as of one."""
    firsts = [start // 4 for _, start, _ in places]
    counts = [(end + 3) // 4 - first for (_, _, end), first in zip(places, firsts, strict=True)]
    of_window = _index(range(len(places)), state.device).repeat_interleave(
        _index(counts, state.device)
    )
    before = [0, *itertools.accumulate(counts)][:-1]
    shift = _index([f - b for f, b in zip(firsts, before, strict=True)], state.device)
    block = torch.arange(sum(counts), device=state.device) + shift[of_window]
    stream = _index([t for t, _, _ in places], state.device)[of_window]
    word = 2**32 - 1
    seed, step = state.unbind()
    counter = torch.stack([block & word, block >> 32, stream, (step & word).expand_as(block)], -1)
    bits = reference_noise.philox4x32(counter, torch.stack([seed, seed >> 32]) & word)
    u = reference_noise.uniform_from_bits(bits).double()
    radius = (-2 * u[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten()
    parts = z.split([4 * count for count in counts])
    return [
        part[start - 4 * first : end - 4 * first]
        for part, first, (_, start, end) in zip(parts, firsts, places, strict=True)
    ]


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
