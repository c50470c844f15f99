"""How the kernels of modality_scores are called: tiles, strides and kinds of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._score_rows import INDICES, LABELS, SHARES

TILE_BYTES = 16384
MAX_BLOCK_CLASSES = 1024
# Rows that are one by one in memory: a warp wants as many of them.
MAX_BLOCK_CLASSES_OF_COLUMNS = 64
NUM_WARPS = 8


def blocks_for(max_classes: int, wide: bool, columns: bool = False) -> tuple[int, int]:
    """Rows and classes of a tile, which is held in registers as float32, or float64 if wide."""
    most = MAX_BLOCK_CLASSES_OF_COLUMNS if columns else MAX_BLOCK_CLASSES
    classes = min(max(triton.next_power_of_2(max_classes), 16), most)
    return TILE_BYTES // (8 if wide else 4) // classes, classes


class Call(NamedTuple):
    """Arguments that all kernels share."""

    rows: tuple[Any, ...]
    constants: dict[str, Any]
    outer: int
    inner: int
    tiles: int
    widest: int
    dtype: torch.dtype


def _by_columns(z: Tensor) -> bool:
    return z.stride(1) != 1 or z.shape[1] == 1


def _strides(z: Tensor) -> tuple[int, int, int]:
    """Strides of outer rows, classes and inner rows, as in csrc/glue/score_rows.h."""
    if z.dim() == 2 or z.shape[2] == 1:
        return 0, z.stride(1), z.stride(0)
    return z.stride(0), z.stride(1), z.stride(2)


def layout_of(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of outer rows, and those of classes or inner rows, whichever are not one by one."""
    found = [(_strides(z), _by_columns(z)) for z in tensors]
    return tuple(s[0] for s, _ in found), tuple(s[1] if by else s[2] for s, by in found)


def call_of(
    logits: Sequence[Tensor],
    labels: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    ignore_index: int,
    multilabel: bool,
) -> Call:
    """The operators' arguments in the kernels' form."""
    first = logits[0]
    flat = first.dim() == 2 or first.shape[2] == 1
    outer, inner = (1, first.shape[0]) if flat else (first.shape[0], first.shape[2])
    wide = [z.dtype == torch.float64 for z in logits]
    class_counts = tuple(z.shape[1] for z in logits)
    columns = sum(_by_columns(z) << m for m, z in enumerate(logits))
    block_rows, block_classes = blocks_for(max(class_counts), any(wide), columns > 0)
    kind = INDICES.value
    strides = (0, 0, 0)
    if labels.is_floating_point():
        kind = (LABELS if multilabel else SHARES).value
        strides = _strides(labels)
    return Call(
        (class_counts, *layout_of(logits), labels, strides, weight, pos_weight, ignore_index),
        {
            "COLUMNS": columns,
            "KIND": kind,
            "BLOCK_ROWS": block_rows,
            "BLOCK_CLASSES": block_classes,
            "num_warps": NUM_WARPS,
            **COMPILE_OPTIONS,
        },
        outer,
        inner,
        outer * triton.cdiv(inner, block_rows),
        wide.index(True) if any(wide) else 0,
        torch.float64 if any(wide) else torch.float32,
    )
