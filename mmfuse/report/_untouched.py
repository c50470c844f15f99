"""Everything that belongs to the user as it was: modules, random states, samplers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..loop.passes import scoring


@contextmanager
def untouched(
    calls: Sequence[Callable[..., Any]], device: torch.device, loaders: Sequence[Any]
) -> Iterator[None]:
    """Evaluation mode and no gradients for all `calls`; afterwards all is as before.

    Iterating a DataLoader draws from PyTorch's generator, a sampler from one of its own, and a data
    set that augments from Python's or NumPy's.
    """
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for generator in _generators(loaders):
            stack.callback(generator.set_state, generator.get_state())
        for call in calls:
            stack.enter_context(scoring(call, device))
        yield


def _generators(loaders: Sequence[Any]) -> list[torch.Generator]:
    """Those that loaders and their samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        for holder in (loader, sampler, inner):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
