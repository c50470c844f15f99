"""Shapes of pairs of features, and what the tolerances of their cosines need to know."""

from __future__ import annotations

from typing import NamedTuple

from cells import Cell
from inputs import wide
from torch import Tensor

from mmfuse.reference.paired_cosine import MIN_NORM

FEW_SHAPES = [(1, 1), (2, 6), (9, 7), (65, 33), (257, 10), (5, 1025)]
SHAPES = [*FEW_SHAPES, (1, 2), (3, 31), (7, 8), (64, 16), (16, 512), (3, 4097), (1, 16385)]


class Rows(NamedTuple):
    """Each row's numbers for the tolerances, [B, 1] or [B, D], in float64."""

    cosines: Tensor
    overlap: Tensor
    norms: tuple[Tensor, Tensor]
    units: tuple[Tensor, Tensor]


def rows_of(a: Tensor, b: Tensor) -> Rows:
    a, b = wide([a, b])
    norms = tuple(x.norm(dim=1, keepdim=True).clamp(min=MIN_NORM) for x in (a, b))
    units = (a / norms[0], b / norms[1])
    product = units[0] * units[1]
    return Rows(product.sum(1, True), product.abs().sum(1, True), norms, units)


def shapes(cell: Cell) -> list[tuple[int, int]]:
    return FEW_SHAPES if cell.slow else SHAPES
