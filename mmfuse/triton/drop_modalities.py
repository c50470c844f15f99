"""Drops whole modalities of single samples: one launch for all of them, and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import round_to, widen
from ._tensor_list import launch_on
from .noise import NOISE_BLOCK, _philox4x32_10, _uniform_from_bits

TILE_SIZE = 4096
NUM_WARPS = 8
# Each modality has a branch of its own in the kernel; longer lists take several launches.
MAX_MODALITIES = 8
# A row of a multiple of so many elements keeps the vector loads, if the compiler knows of it.
VECTOR = 16


class Layout(NamedTuple):
    """How the launches divide [B, D_m] tensors into tiles; each field has an entry per modality.

    Attributes:
        units: Row widths, in units.
        unit: Elements in a unit, known to the compiler.
        block_cols: Columns of a tile; its rows are TILE_SIZE over these.
        n_tiles: Number of tiles, for the grid; the kernel reckons its own.
    """

    units: tuple[int, ...]
    unit: tuple[int, ...]
    block_cols: tuple[int, ...]
    n_tiles: tuple[int, ...]


def layout_of(widths: Sequence[int], n_rows: int) -> Layout:
    """Divides tensors of so many rows of these widths into tiles."""
    unit = tuple(1 if width % VECTOR else VECTOR for width in widths)
    cols = tuple(min(triton.next_power_of_2(max(w, 1)), TILE_SIZE) for w in widths)
    # A tensor without columns has tiles as well, since they write what was kept.
    tiles = [
        triton.cdiv(n_rows, TILE_SIZE // c) * max(triton.cdiv(w, c), 1)
        for w, c in zip(widths, cols, strict=True)
    ]
    units = tuple(w // u for w, u in zip(widths, unit, strict=True))
    return Layout(units, unit, cols, tuple(tiles))


def _disguised(values: Sequence[int]) -> tuple[int, ...]:
    """Odd numbers above 1 in place of numbers of at least 0, for `_plain` to undo.

    Triton compiles a kernel anew where a number in a tuple is 1, or a multiple of 16, whatever
    `do_not_specialize` says of the tuple.
    """
    return tuple(2 * value + 3 for value in values)


@triton.jit
def _plain(disguised):
    """The number that `_disguised` was given."""
    return ((disguised - 3) >> 1).to(tl.int64)


@triton.jit
def _draw(noise_state_ptr, stream_id, element):
    """Uniform numbers of any elements, at the cost of one Philox call for each."""
    seed = tl.load(noise_state_ptr)
    step = tl.load(noise_state_ptr + 1)
    x0, x1, x2, x3 = _philox4x32_10(seed, element // NOISE_BLOCK, stream_id, step)
    upper = (element & 2) != 0
    odd = (element & 1) != 0
    return _uniform_from_bits(tl.where(odd, tl.where(upper, x3, x1), tl.where(upper, x2, x0)))


@triton.jit
def _drop_tile(
    out_ptr,
    x_ptr,
    keep_ptr,
    q,
    noise_state_ptr,
    stream_id,
    offset,
    scale_ptr,
    n_rows,
    units,
    tile,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Writes keep ? scale x : 0 for a tile; without a noise state keep is read, not drawn."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    width = units * UNIT
    col_tiles = tl.maximum(tl.cdiv(width, BLOCK_COLS), 1)
    row = tile // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tile % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = row < n_rows
    if noise_state_ptr is None:
        keep = tl.load(keep_ptr + row, mask=inside, other=0) != 0
    else:
        u = _draw(noise_state_ptr, stream_id, row + offset)
        # Not u > q: where q is NaN everything stays.
        keep = (u <= q) == 0
        if tile % col_tiles == 0:
            tl.store(keep_ptr + row, keep.to(tl.uint8), mask=inside)
    offsets = (row * width)[:, None] + col[None, :]
    mask = inside[:, None] & (col < width)[None, :]
    # Dropped features are not read.
    x = tl.load(x_ptr + offsets, mask=mask & keep[:, None], other=0.0)
    if scale_ptr is not None:
        y = tl.where(keep[:, None], widen(x, ACC) * tl.load(scale_ptr).to(ACC), 0.0)
        x = round_to(y, DTYPE)
    tl.store(out_ptr + offsets, x, mask=mask)


@triton.jit(
    do_not_specialize=[
        "keep_ptr", "q_ptr", "noise_state_ptr", "scale_ptr", "n_rows",
    ]
)  # fmt: skip
def _drop_modalities_kernel(
    out_ptrs,
    x_ptrs,
    keep_ptr,
    q_ptr,
    noise_state_ptr,
    stream_ids,
    offsets,
    scale_ptr,
    n_rows: tl.int64,
    units,
    UNIT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    """Handles one tile of one modality; scale_ptr, or what keep is drawn from, may be None.

    stream_ids, offsets and units are `_disguised`.
    """
    tile = tl.program_id(0).to(tl.int64)
    # The interpreter ignores the annotations.
    n_rows = n_rows.to(tl.int64)
    # Each modality has a pointer type of its own, hence the branches.
    for m in tl.static_range(len(x_ptrs)):
        width = _plain(units[m]) * UNIT[m]
        row_tiles = tl.cdiv(n_rows, TILE_SIZE // BLOCK_COLS[m])
        n_tiles = row_tiles * tl.maximum(tl.cdiv(width, BLOCK_COLS[m]), 1)
        if (tile >= 0) & (tile < n_tiles):
            _drop_tile(
                out_ptrs[m],
                x_ptrs[m],
                keep_ptr + m * n_rows,
                None if q_ptr is None else tl.load(q_ptr + m),
                noise_state_ptr,
                None if noise_state_ptr is None else _plain(stream_ids[m]),
                None if noise_state_ptr is None else _plain(offsets[m]),
                scale_ptr,
                n_rows,
                _plain(units[m]),
                tile,
                UNIT[m],
                TILE_SIZE // BLOCK_COLS[m],
                BLOCK_COLS[m],
            )
        # Among those of the next modality; those that have found their own are below 0.
        tile -= n_tiles


def _launch(
    xs: Sequence[Tensor],
    keep: Tensor,
    q: Tensor | None,
    noise_state: Tensor | None,
    noise_ids: Sequence[int] | None,
    noise_offsets: Sequence[int] | None,
    scale: Tensor | None,
) -> list[Tensor]:
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    n_rows = keep.shape[1]
    if n_rows == 0:
        return outs
    with launch_on(keep.device):
        for first in range(0, len(xs), MAX_MODALITIES):
            part = slice(first, first + MAX_MODALITIES)
            layout = layout_of([x.numel() // n_rows for x in xs[part]], n_rows)
            _drop_modalities_kernel[(sum(layout.n_tiles),)](
                tuple(outs[part]),
                tuple(xs[part]),
                keep[part].view(torch.uint8),
                None if q is None else q[part],
                noise_state,
                None if noise_ids is None else _disguised(noise_ids[part]),
                None if noise_offsets is None else _disguised(noise_offsets[part]),
                scale,
                n_rows,
                _disguised(layout.units),
                **_constants(layout),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return outs


def _constants(layout: Layout) -> dict[str, Any]:
    return {"UNIT": layout.unit, "BLOCK_COLS": layout.block_cols, "TILE_SIZE": TILE_SIZE}


def drop_modalities(
    features: Sequence[Tensor],
    q: Tensor,
    noise_state: Tensor,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
    scale: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """See `mmfuse.ops.drop_modalities`."""
    shape = (len(features), features[0].shape[0])
    keep = torch.empty(shape, dtype=torch.bool, device=features[0].device)
    return _launch(features, keep, q, noise_state, noise_ids, noise_offsets, scale), keep


def drop_modalities_backward(
    grads: Sequence[Tensor], keep: Tensor, scale: Tensor | None
) -> list[Tensor]:
    """Grads times scale for the samples that were kept, 0 for the others, whatever they hold."""
    return _launch(grads, keep, None, None, None, None, scale)
