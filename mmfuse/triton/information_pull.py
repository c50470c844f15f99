"""InfoReg's gap and strength, and what they are for each tensor: one launch."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPARING_OPTIONS
from ._tensor_list import launch_on

BLOCK_SIZE = 128
NUM_WARPS = 4


@triton.jit
def score_at(scores_ptr, counts_ptr, at, ONE_COUNT: tl.constexpr):
    """float64 scores, times their counts if there are any."""
    score = tl.load(scores_ptr + at).to(tl.float64)
    if counts_ptr is not None:
        score *= tl.load(counts_ptr + (at * 0 if ONE_COUNT else at)).to(tl.float64)
    return score


@triton.jit
def ahead(scores_ptr, counts_ptr, m, j, n_modalities, TABLE: tl.constexpr, ONE_COUNT: tl.constexpr):
    """The lead of int64 m over j, for a block of modalities m; NaN if they share no sample."""
    other = m * 0 + j
    ours = m * n_modalities + j if TABLE else m
    theirs = other * n_modalities + m if TABLE else other
    mine = score_at(scores_ptr, counts_ptr, ours, ONE_COUNT)
    return mine - score_at(scores_ptr, counts_ptr, theirs, ONE_COUNT)


@triton.jit
def tanh_of(x):
    """Tanh x for x ≥ 0, to a few units of 2⁻⁵³."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit(
    do_not_specialize=[
        *("scores_ptr", "counts_ptr", "open_ptr", "steps_ptr", "owner_ptr", "multipliers_ptr"),
        *("coefficients_ptr", "gap_ptr", "counted_ptr", "scale_ptr", "pull_ptr"),
        *("beta_bits", "n_modalities", "n_tensors"),
    ]
)
def _information_pull_kernel(
    scores_ptr,
    counts_ptr,
    open_ptr,
    steps_ptr,
    owner_ptr,
    multipliers_ptr,
    coefficients_ptr,
    gap_ptr,
    counted_ptr,
    scale_ptr,
    pull_ptr,
    beta_bits: tl.int64,
    n_modalities,
    n_tensors,
    TABLE: tl.constexpr,
    ONE_COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The first lanes decide about a modality, the others about a tensor, by its owner's scores.

    Floats come as their bits: Triton would round them to float32.
    """
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    t = i - n_modalities
    is_modality = t < 0
    is_tensor = (t >= 0) & (t < n_tensors)
    owner = tl.load(owner_ptr + t, mask=is_tensor, other=0)
    m = tl.where(is_modality, i, owner)
    total = tl.zeros((BLOCK_SIZE,), tl.float64)
    behind = tl.zeros((BLOCK_SIZE,), tl.float64)
    for j in range(n_modalities):
        difference = ahead(scores_ptr, counts_ptr, m, j, n_modalities, TABLE, ONE_COUNT)
        is_behind = difference > 0.0
        total += tl.where(is_behind, difference, 0.0)
        behind += tl.where(is_behind, 1.0, 0.0)
    gap = total / tl.maximum(behind, 1.0)
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)
    alpha = tl.exp(beta * tanh_of(gap))
    if multipliers_ptr is not None:
        alpha *= tl.load(multipliers_ptr + m).to(tl.float64)
    regulated = (tl.load(open_ptr + m) != 0) & (gap > 0.0)
    number: tl.constexpr = coefficients_ptr.dtype.element_ty
    alpha = tl.where(regulated, alpha, 0.0).to(number)
    tl.store(scale_ptr + t, tl.full((BLOCK_SIZE,), 1.0, number), mask=is_tensor)
    tl.store(pull_ptr + t, alpha, mask=is_tensor)
    tl.store(coefficients_ptr + i, alpha, mask=is_modality)
    tl.store(gap_ptr + i, gap, mask=is_modality)
    step = tl.full((BLOCK_SIZE,), 1, tl.int64)
    if TABLE:
        own = tl.load(scores_ptr + m * n_modalities + m)
        step = tl.where(own == own, step, 0)
    steps = tl.load(steps_ptr + i, mask=is_modality, other=0)
    tl.store(counted_ptr + i, steps + step, mask=is_modality)


def information_pull(
    scores: Tensor,
    count: Tensor | None,
    window_open: Tensor,
    steps: Tensor,
    owner: Tensor,
    beta: float,
    multipliers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.information_pull`."""
    n_modalities, n_tensors = scores.shape[0], owner.numel()
    coefficients = scores.new_empty(n_modalities)
    gap = scores.new_empty(n_modalities, dtype=torch.float64)
    counted = torch.empty_like(steps)
    scale, pull = scores.new_empty(n_tensors), scores.new_empty(n_tensors)
    (beta_bits,) = struct.unpack("<q", struct.pack("<d", beta))
    with launch_on(scores.device):
        _information_pull_kernel[(triton.cdiv(n_modalities + n_tensors, BLOCK_SIZE),)](
            scores,
            count,
            window_open.view(torch.uint8),
            steps,
            owner,
            multipliers,
            coefficients,
            gap,
            counted,
            scale,
            pull,
            beta_bits,
            n_modalities,
            n_tensors,
            TABLE=scores.dim() == 2,
            ONE_COUNT=count is not None and count.numel() == 1,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPARING_OPTIONS,
        )
    return coefficients, gap, counted, scale, pull
