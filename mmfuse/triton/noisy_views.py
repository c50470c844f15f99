"""Two noisy views from one read, and their mean squared distance: two launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import round_to, widen
from ._partials import BLOCK_SIZE, CHUNK_SIZE, NUM_WARPS, accumulator, mean, squared_distance
from ._tensor_list import launch_on
from .noise import NOISE_BLOCK, _box_muller, _philox4x32_10, normal_tile


@triton.jit
def _normal_at(seed, stream_id, step, element):
    """Standard normal numbers of any elements, at the cost of one Philox call for each."""
    x0, x1, x2, x3 = _philox4x32_10(seed, element >> 2, stream_id, step)
    upper = (element & 2) != 0
    z0, z1 = _box_muller(tl.where(upper, x2, x0), tl.where(upper, x3, x1))
    return tl.where((element & 1) != 0, z1, z0)


@triton.jit
def _view_tile(
    first_ptr,
    second_ptr,
    x_ptr,
    start,
    mask,
    sigma,
    seed,
    step,
    first_id,
    second_id,
    first_element,
    second_element,
    ACC: tl.constexpr,
    IN_PHASE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes both views of one tile; returns the squared distances of what is stored."""
    offsets = start + tl.arange(0, BLOCK_SIZE)
    DTYPE: tl.constexpr = first_ptr.dtype.element_ty
    N_BLOCKS: tl.constexpr = BLOCK_SIZE // NOISE_BLOCK
    x = widen(tl.load(x_ptr + offsets, mask=mask), ACC)
    z = normal_tile(seed, first_id, step, (first_element + start) >> 2, N_BLOCKS)
    first = round_to(x + sigma * z.to(ACC), DTYPE)
    tl.store(first_ptr + offsets, first, mask=mask)
    if IN_PHASE:
        z = normal_tile(seed, second_id, step, (second_element + start) >> 2, N_BLOCKS)
    else:
        z = _normal_at(seed, second_id, step, second_element + offsets)
    second = round_to(x + sigma * z.to(ACC), DTYPE)
    tl.store(second_ptr + offsets, second, mask=mask)
    return squared_distance(first, second, mask, ACC)


@triton.jit(
    do_not_specialize=[
        "n_elements", "sigma_bits", "noise_state_ptr", "first_id", "second_id", "first_offset",
        "second_offset", "partials_ptr",
    ]
)  # fmt: skip
def _noisy_views_kernel(
    first_ptr,
    second_ptr,
    x_ptr,
    n_elements: tl.int64,
    sigma_bits: tl.int64,
    noise_state_ptr,
    first_id: tl.int64,
    second_id: tl.int64,
    first_offset: tl.int64,
    second_offset: tl.int64,
    partials_ptr,
    ALIGNED: tl.constexpr,
    IN_PHASE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes x + sigma N(0, 1) twice for one chunk, and the sum of the squared distances.

    Chunks are counted from the beginning of the noise block in which the first view starts.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    chunk = tl.program_id(0).to(tl.int64)
    # The interpreter ignores the annotations.
    first_offset = first_offset.to(tl.int64)
    start = chunk * CHUNK_SIZE
    if not ALIGNED:
        start -= first_offset & 3
    first_ptr += start
    second_ptr += start
    x_ptr += start
    sigma = sigma_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    seed = tl.load(noise_state_ptr)
    step = tl.load(noise_state_ptr + 1)
    first_id = first_id.to(tl.int64)
    second_id = second_id.to(tl.int64)
    first_element = first_offset + start
    second_element = second_offset.to(tl.int64) + start
    count = tl.minimum(n_elements.to(tl.int64) - start, CHUNK_SIZE).to(tl.int32)
    # Elements of the first noise block that belong to what precedes the tensor.
    before = tl.maximum(-start, 0).to(tl.int32)
    total = tl.zeros([BLOCK_SIZE], ACC)
    # A mask would cost the vector loads, so whole tiles go without one.
    n_whole = count // BLOCK_SIZE if ALIGNED else 0
    for tile in range(n_whole):
        total += _view_tile(
            first_ptr, second_ptr, x_ptr, tile * BLOCK_SIZE, None, sigma, seed, step,
            first_id, second_id, first_element, second_element, ACC, IN_PHASE, BLOCK_SIZE,
        )  # fmt: skip
    for tile in range(n_whole, tl.cdiv(count, BLOCK_SIZE)):
        offsets = tile * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < count
        if not ALIGNED:
            mask = mask & (offsets >= before)
        total += _view_tile(
            first_ptr, second_ptr, x_ptr, tile * BLOCK_SIZE, mask, sigma, seed, step,
            first_id, second_id, first_element, second_element, ACC, IN_PHASE, BLOCK_SIZE,
        )  # fmt: skip
    tl.store(partials_ptr + chunk, tl.sum(total, axis=0).to(tl.float64))


def _constants(aligned: bool, in_phase: bool) -> dict[str, Any]:
    return {
        "ALIGNED": aligned,
        "IN_PHASE": in_phase,
        "CHUNK_SIZE": CHUNK_SIZE,
        "BLOCK_SIZE": BLOCK_SIZE,
    }


def noisy_views(
    x: Tensor,
    sigma: float,
    noise_state: Tensor,
    noise_ids: Sequence[int],
    noise_offsets: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.noisy_views`; one stream id and one offset for each view."""
    first = torch.empty_like(x, memory_format=torch.contiguous_format)
    second = torch.empty_like(first)
    numel = x.numel()
    shift = noise_offsets[0] % 4
    in_phase = noise_offsets[1] % 4 == shift
    aligned = shift == 0 and all(t.data_ptr() % 16 == 0 for t in (x, first, second))
    chunks = triton.cdiv(numel + shift, CHUNK_SIZE) if numel else 0
    partials = torch.empty(chunks, dtype=torch.float64, device=x.device)
    if numel:
        # It is passed by its bits, because Triton passes a Python float as float32.
        (sigma_bits,) = struct.unpack("<q", struct.pack("<d", sigma))
        with launch_on(x.device):
            _noisy_views_kernel[(chunks,)](
                first,
                second,
                x,
                numel,
                sigma_bits,
                noise_state,
                *noise_ids,
                *noise_offsets,
                partials,
                **_constants(aligned, in_phase),
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return first, second, mean(partials, numel, accumulator(x))
