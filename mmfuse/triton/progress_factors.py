"""CGGM's progress, shares and coefficients, and what they are for each tensor: one launch."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.progress_factors import EPS as _EPS
from ._aot import COMPILE_OPTIONS
from ._tensor_list import launch_on

BLOCK_SIZE = 128
NUM_WARPS = 4


@triton.jit
def _now(scores_ptr, m, j, n_modalities, TABLE: tl.constexpr):
    """float64 score of m over the samples that m and j have; without a table over all."""
    return tl.load(scores_ptr + (m * n_modalities + j if TABLE else m)).to(tl.float64)


@triton.jit
def _change(scores_ptr, last_ptr, m, j, n_modalities, TABLE: tl.constexpr):
    """That score less the last one."""
    last = tl.load(last_ptr + m * n_modalities + (j if TABLE else m)).to(tl.float64)
    return _now(scores_ptr, m, j, n_modalities, TABLE) - last


@triton.jit(
    do_not_specialize=[
        *("scores_ptr", "last_ptr", "last_shares_ptr", "owner_ptr"),
        *("coefficients_ptr", "progress_ptr", "shares_ptr", "scale_ptr"),
        *("kept_scores_ptr", "kept_shares_ptr", "rho_bits", "bound_bits", "eps_bits"),
        *("n_modalities", "n_tensors"),
    ]
)
def _progress_factors_kernel(
    scores_ptr,
    last_ptr,
    last_shares_ptr,
    owner_ptr,
    coefficients_ptr,
    progress_ptr,
    shares_ptr,
    scale_ptr,
    kept_scores_ptr,
    kept_shares_ptr,
    rho_bits: tl.int64,
    bound_bits: tl.int64,
    eps_bits: tl.int64,
    n_modalities,
    n_tensors,
    TABLE: tl.constexpr,
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
    rho = rho_bits.to(tl.int64).to(tl.float64, bitcast=True)
    bound = bound_bits.to(tl.int64).to(tl.float64, bitcast=True)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    number: tl.constexpr = coefficients_ptr.dtype.element_ty
    others = tl.zeros((BLOCK_SIZE,), tl.float64)
    ours_sum = tl.zeros((BLOCK_SIZE,), tl.float64)
    compared = tl.zeros((BLOCK_SIZE,), tl.float64)
    for j in range(n_modalities):
        j_block = m * 0 + j
        theirs = _change(scores_ptr, last_ptr, j_block, m, n_modalities, TABLE)
        ours = _change(scores_ptr, last_ptr, m, j_block, n_modalities, TABLE)
        both = (m != j) & (theirs == theirs) & (ours == ours)
        others += tl.where(both, theirs, 0.0)
        ours_sum += tl.where(both, ours, 0.0)
        compared += tl.where(both, 1.0, 0.0)
        now = _now(scores_ptr, m, j_block, n_modalities, TABLE)
        last = tl.load(last_ptr + m * n_modalities + j).to(tl.float64)
        kept = tl.where(now == now, now, last).to(number)
        tl.store(kept_scores_ptr + m * n_modalities + j, kept, mask=is_modality)
    progress = _change(scores_ptr, last_ptr, m, m, n_modalities, TABLE)
    mine = progress
    if TABLE:
        mine = ours_sum / tl.maximum(compared, 1.0)
    share = (others + eps) / (others + mine + eps)
    share = tl.where(share > bound, bound, tl.where(share < -bound, -bound, share))
    share = tl.where(compared > 0.0, share, float("nan"))
    known = share == share
    coefficient = tl.where(known, rho * share, 1.0).to(number)
    factor: tl.constexpr = scale_ptr.dtype.element_ty
    last_share = tl.load(last_shares_ptr + m).to(tl.float64)
    tl.store(scale_ptr + t, coefficient.to(factor), mask=is_tensor)
    tl.store(coefficients_ptr + i, coefficient, mask=is_modality)
    tl.store(progress_ptr + i, progress.to(number), mask=is_modality)
    tl.store(shares_ptr + i, share.to(number), mask=is_modality)
    kept_share = tl.where(known, share, last_share).to(number)
    tl.store(kept_shares_ptr + i, kept_share, mask=is_modality)


def progress_factors(
    scores: Tensor,
    last_scores: Tensor,
    last_shares: Tensor,
    owner: Tensor,
    rho: float,
    bound: float,
    wide_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.progress_factors`."""
    n_modalities, n_tensors = scores.shape[0], owner.numel()
    coefficients = last_scores.new_empty(n_modalities)
    progress = last_scores.new_empty(n_modalities)
    shares = last_scores.new_empty(n_modalities)
    scale = owner.new_empty(n_tensors, dtype=torch.float64 if wide_scale else torch.float32)
    kept_scores = last_scores.new_empty(n_modalities, n_modalities)
    kept_shares = last_scores.new_empty(n_modalities)
    bits = struct.unpack("<qqq", struct.pack("<ddd", rho, bound, _EPS))
    with launch_on(scores.device):
        _progress_factors_kernel[(triton.cdiv(n_modalities + n_tensors, BLOCK_SIZE),)](
            scores,
            last_scores,
            last_shares,
            owner,
            coefficients,
            progress,
            shares,
            scale,
            kept_scores,
            kept_shares,
            *bits,
            n_modalities,
            n_tensors,
            TABLE=scores.dim() == 2,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return coefficients, progress, shares, scale, kept_scores, kept_shares
