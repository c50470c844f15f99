"""The pass that update_grads_ and scale_grad share: read a tile, change it, write it."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import not_finite, round_to, widen
from .noise import NOISE_BLOCK, normal_tile

CHUNK_SIZE = 8192
BLOCK_SIZE = 1024
NUM_WARPS = 4


@triton.jit
def _divide(number, divisor):
    """The quotient of int32 numbers below 2^21 by a scalar, by a float32 multiplication.

    The half keeps the product 0.5 / divisor away from whole numbers, more than it is off by.
    """
    return ((number.to(tl.float32) + 0.5) * (1.0 / divisor.to(tl.float32))).to(tl.int32)


@triton.jit
def _in_memory(offsets, spot):
    """Places in memory of a chunk's elements, counted from the first one's row on.

    Args:
        offsets: int32 logical distances from the chunk's first element.
        spot: The rows' numbers of channels and of places in each, and the first element's channel
            and place, all int32 scalars.
    """
    channels, spatial, first_channel, first_place = spot
    place = first_place + offsets
    carry = _divide(place, spatial)
    place -= carry * spatial
    channel = first_channel + carry
    row = _divide(channel, channels)
    channel -= row * channels
    return (row * spatial + place) * channels + channel


@triton.jit
def _update_tile(
    out_ptr,
    grad_ptr,
    param_ptr,
    anchor_ptr,
    offsets,
    spot,
    mask,
    write,
    scale,
    pull,
    noise_std,
    seed,
    step,
    noise_id,
    noise_block,
    ACC: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Updates one tile; returns the magnitude of what is stored, and the squares of what was."""
    if spot is not None:
        offsets = _in_memory(offsets, spot)
    g = widen(tl.load(grad_ptr + offsets, mask=mask), ACC)
    y = scale * g
    # Selected by value, because 0 times a displacement that is not finite would not be 0.
    if param_ptr is not None and pull != 0:
        displacement = widen(tl.load(param_ptr + offsets, mask=mask), ACC)
        if anchor_ptr is not None:
            displacement -= widen(tl.load(anchor_ptr + offsets, mask=mask), ACC)
        y += pull * displacement
    if noise_std is not None and noise_std != 0:
        z = normal_tile(seed, noise_id, step, noise_block, BLOCK_SIZE // NOISE_BLOCK)
        y += noise_std * z.to(ACC)
    stored = round_to(y, out_ptr.dtype.element_ty)
    if write:
        tl.store(out_ptr + offsets, stored, mask=mask)
    size = tl.abs(widen(stored, ACC))
    square = g * g
    if mask is not None:
        size = tl.where(mask, size, 0.0)
        square = tl.where(mask, square, 0.0)
    return size, square


@triton.jit
def _larger(a, b):
    """Elementwise maximum in which a NaN stays."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def update_chunk(
    out_ptr,
    grad_ptr,
    param_ptr,
    anchor_ptr,
    chunk,
    numel,
    write,
    scale,
    pull,
    noise_std,
    noise_state_ptr,
    noise_id,
    noise_offset,
    row_order,
    finite_ptr,
    square_ptr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes scale g + pull (w - w0) + noise_std N(0, 1) for one chunk of a tensor.

    Chunks are counted from the beginning of the noise block in which the tensor starts, so that
    any noise_offset costs one Philox call per four elements.

    Args:
        out_ptr: The result; may be grad_ptr.
        grad_ptr: The tensor g.
        param_ptr: The tensor w, or None with `pull`.
        anchor_ptr: The tensor w0, or None for 0 and with `pull`.
        chunk: int64 scalar.
        numel: int64 scalar.
        write: True to write; False only to look whether all is finite.
        scale: ACC scalar.
        pull: ACC scalar or None.
        noise_std: ACC scalar or None, as are the other noise arguments.
        noise_state_ptr: int64 (seed, step).
        noise_id: int64 scalar, the tensor's random stream.
        noise_offset: int64 scalar, place of the first element in that stream.
        row_order: int64 scalar, channels and places of the rows of a tensor in channels_last, whose
            elements are counted as if it were contiguous; None for one that is.
        finite_ptr: uint8 to set to 0 where a NaN or an Inf is stored, or None.
        square_ptr: float64 for the chunk's sum of g^2 before the update, or None.
        ACC: In what to compute.
        ALIGNED: Pointers are 16-byte aligned and noise_offset is a multiple of 4.
        CHUNK_SIZE: Elements per chunk.
        BLOCK_SIZE: Elements per tile, a power of two.
    """
    start = chunk * CHUNK_SIZE
    seed = None
    step = None
    noise_block = None
    if noise_std is not None:
        seed = tl.load(noise_state_ptr)
        step = tl.load(noise_state_ptr + 1)
        noise_block = (noise_offset >> 2) + chunk * (CHUNK_SIZE // NOISE_BLOCK)
        if not ALIGNED:
            start -= noise_offset & 3
    spot = None
    origin = start
    if row_order is not None:
        channels = row_order >> 32
        spatial = row_order & 0xFFFFFFFF
        # Memory before the tensor counts as a row of it, which the mask leaves out.
        lead = tl.where(start < 0, channels * spatial, 0)
        origin = (start + lead) // (channels * spatial) * (channels * spatial) - lead
        spot = (
            channels.to(tl.int32),
            spatial.to(tl.int32),
            ((start - origin) // spatial).to(tl.int32),
            ((start - origin) % spatial).to(tl.int32),
        )
    out_ptr += origin
    grad_ptr += origin
    if param_ptr is not None:
        param_ptr += origin
    if anchor_ptr is not None:
        anchor_ptr += origin
    count = tl.minimum(numel - start, CHUNK_SIZE).to(tl.int32)
    if finite_ptr is None and square_ptr is None:
        count = tl.where(write, count, 0)
    # Elements of the first noise block that belong to what precedes the tensor.
    before = tl.maximum(-start, 0).to(tl.int32)
    lane = tl.arange(0, BLOCK_SIZE)
    largest = tl.zeros([BLOCK_SIZE], ACC)
    squares = tl.zeros([BLOCK_SIZE], ACC)
    # A mask would cost the vector loads, so whole tiles go without one.
    n_whole = count // BLOCK_SIZE if ALIGNED else 0
    for tile in range(n_whole):
        size, square = _update_tile(
            out_ptr, grad_ptr, param_ptr, anchor_ptr, tile * BLOCK_SIZE + lane, spot, None, write,
            scale, pull, noise_std, seed, step, noise_id,
            None if noise_std is None else noise_block + tile * (BLOCK_SIZE // NOISE_BLOCK),
            ACC, BLOCK_SIZE,
        )  # fmt: skip
        if finite_ptr is not None:
            largest = _larger(largest, size)
        if square_ptr is not None:
            squares += square
    for tile in range(n_whole, tl.cdiv(count, BLOCK_SIZE)):
        offsets = tile * BLOCK_SIZE + lane
        mask = offsets < count
        if not ALIGNED:
            mask = mask & (offsets >= before)
        size, square = _update_tile(
            out_ptr, grad_ptr, param_ptr, anchor_ptr, offsets, spot, mask, write,
            scale, pull, noise_std, seed, step, noise_id,
            None if noise_std is None else noise_block + tile * (BLOCK_SIZE // NOISE_BLOCK),
            ACC, BLOCK_SIZE,
        )  # fmt: skip
        if finite_ptr is not None:
            largest = _larger(largest, size)
        if square_ptr is not None:
            squares += square
    if finite_ptr is not None:
        found = tl.max(not_finite(largest).to(tl.int32), axis=0)
        tl.store(finite_ptr, 0, mask=found != 0)
    if square_ptr is not None:
        tl.store(square_ptr, tl.sum(squares, axis=0).to(tl.float64))
