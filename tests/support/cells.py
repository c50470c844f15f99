"""The backends under test, each on the devices where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch


class Cell(NamedTuple):
    """One column of the grid on one kind of device."""

    backend: str
    device: str

    @property
    def slow(self) -> bool:
        """Triton's interpreter: large inputs would take minutes."""
        return self == Cell("triton", "cpu")

    def affordable(self, sizes: Sequence[int]) -> list[int]:
        """The sizes that take the interpreter no minutes; Triton's chunks are at most 8,192."""
        return [n for n in sizes if n < 9_000] if self.slow else list(sizes)

    def skip_slow(self, variant: bool = True) -> None:
        """Skips a variant in the interpreter, where others show the same."""
        if self.slow and variant:
            pytest.skip("takes the interpreter long; other variants or backends show the same")


CELLS = [Cell(backend, "cpu") for backend in ("reference", "cpu", "triton", "cuda")]
if torch.cuda.is_available():
    CELLS += [Cell(backend, "cuda") for backend in ("reference", "triton", "cuda")]

ON_THE_CPU = pytest.mark.parametrize("cell", [Cell("cpu", "cpu")], indirect=True, ids=str)
