"""Comparing runs on several ranks, and counting what they reduce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

CLASSES = 5
# Everything is float64 where two runs are compared. A step rounds each number a few times, sums
# over at most 300 terms, and the comparison is after at most 6 steps: 1e-16 · 300 · 6 ≈ 2e-13 of
# the largest number, with a factor of 500 for ratios that amplify.
SAME = {"rtol": 1e-10, "atol": 1e-10}


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """The sizes of all reductions that Python code asks for; DDP's own are in C++."""
    sizes: list[int] = []
    original = module.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    module.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        module.all_reduce = original
