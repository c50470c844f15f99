"""Sums over a whole tensor: every program leaves one, a last launch adds them in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import widen
from ._tensor_list import launch_on

CHUNK_SIZE = 8192
BLOCK_SIZE = 2048
NUM_WARPS = 8
MERGE_BLOCK = 1024
MERGE_WARPS = 4


@triton.jit
def squared_distance(a, b, mask, ACC: tl.constexpr):
    """Elementwise (a - b)^2 in ACC, 0 where masked."""
    d = widen(a, ACC) - widen(b, ACC)
    return d * d if mask is None else tl.where(mask, d * d, 0.0)


@triton.jit
def mean_of(partials_ptr, n_partials, count, BLOCK_SIZE: tl.constexpr):
    """Sum of the float64 partials divided by count, as a float64 scalar; NaN for count = 0."""
    lane = tl.arange(0, BLOCK_SIZE)
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, n_partials, BLOCK_SIZE):
        i = start + lane
        total += tl.load(partials_ptr + i, mask=i < n_partials, other=0.0)
    return tl.sum(total, axis=0) / count.to(tl.float64)


@triton.jit(do_not_specialize=["partials_ptr", "out_ptr", "n_partials", "count"])
def _mean_kernel(partials_ptr, out_ptr, n_partials, count: tl.int64, BLOCK_SIZE: tl.constexpr):
    """Writes the sum of all partials divided by count."""
    mean = mean_of(partials_ptr, n_partials, count, BLOCK_SIZE)
    tl.store(out_ptr, mean.to(out_ptr.dtype.element_ty))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are formed and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mean(partials: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """0-d sum of float64 partials divided by count; NaN for count = 0."""
    out = torch.empty((), dtype=dtype, device=partials.device)
    with launch_on(partials.device):
        _mean_kernel[(1,)](
            partials,
            out,
            partials.numel(),
            count,
            BLOCK_SIZE=MERGE_BLOCK,
            num_warps=MERGE_WARPS,
            **COMPILE_OPTIONS,
        )
    return out
