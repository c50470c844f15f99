"""Means over the rows: sums by one launch, and by another if many programs share the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._score_call import Call
from ._tensor_list import launch_on

# Up to so many tiles of rows, one program takes them all and needs no second launch.
TILES_IN_ONE_LAUNCH = 8
MAX_SPLITS = 256
MERGE_WARPS = 4


@triton.jit
def store_means(prob_sum, log_sum, weights, prob_ptr, log_prob_ptr, count_ptr, sum_ptr):
    """Writes the means over rows of [rows] sums, and the rows' weight if count_ptr wants it.

    With sum_ptr their sums instead, and the weight there.
    """
    out = prob_ptr.dtype.element_ty
    prob = tl.sum(prob_sum, axis=0)
    log_prob = tl.sum(log_sum, axis=0)
    count = tl.sum(weights, axis=0)
    if sum_ptr is None:
        prob = prob / count.to(prob.dtype)
        log_prob = log_prob / count.to(prob.dtype)
        if count_ptr is not None:
            tl.store(count_ptr, count)
    else:
        tl.store(sum_ptr, count)
    tl.store(prob_ptr, prob.to(out))
    tl.store(log_prob_ptr, log_prob.to(out))


@triton.jit(
    do_not_specialize=["sums_ptr", "prob_ptr", "log_prob_ptr", "count_ptr", "widest", "n_splits"]
)
def _modality_scores_merge_kernel(
    sums_ptr, prob_ptr, log_prob_ptr, count_ptr, widest, n_splits, BLOCK_SIZE: tl.constexpr
):
    """Means of one modality from float64 sums [3, M, splits] of p, of ln p, and of weights."""
    m = tl.program_id(0)
    stride = tl.num_programs(0) * n_splits
    lane = tl.arange(0, BLOCK_SIZE)
    first_ptr = sums_ptr + m * n_splits + lane
    used = lane < n_splits
    prob = tl.sum(tl.load(first_ptr, mask=used, other=0.0), axis=0)
    log_prob = tl.sum(tl.load(first_ptr + stride, mask=used, other=0.0), axis=0)
    count = tl.sum(tl.load(first_ptr + 2 * stride, mask=used, other=0.0), axis=0)
    tl.store(prob_ptr + m, (prob / count).to(prob_ptr.dtype.element_ty))
    tl.store(log_prob_ptr + m, (log_prob / count).to(log_prob_ptr.dtype.element_ty))
    if m == widest:
        tl.store(count_ptr, count)


def launch_means(
    kernel: Any,
    call: Call,
    logits: Sequence[Tensor],
    rows: tuple[Any, ...],
    constants: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two means [M] of rows, as `kernel` adds them up, and the rows' weight.

    Args:
        kernel: Takes logits, `rows`, three results, sums, and how the tiles are shared out.
        call: The operator's arguments.
        logits: Of each modality.
        rows: The kernel's further inputs.
        constants: Its compile-time arguments.
        dtype: Of the means; None for that of the scores.
    """
    count, device = len(logits), logits[0].device
    prob = torch.empty(count, dtype=dtype or call.dtype, device=device)
    log_prob = torch.empty_like(prob)
    weight = torch.empty((), dtype=torch.float64, device=device)
    splits = 1 if call.tiles <= TILES_IN_ONE_LAUNCH else min(call.tiles, MAX_SPLITS)
    sums = None
    outputs: tuple[Tensor | None, ...] = (prob, log_prob, weight, None)
    if splits > 1:
        sums = torch.empty((3, count, splits), dtype=torch.float64, device=device)
        outputs = (sums[0], sums[1], None, sums[2])
    with launch_on(device):
        kernel[(splits, count)](
            tuple(logits),
            *rows,
            *outputs,
            call.inner,
            call.tiles,
            triton.cdiv(call.tiles, splits),
            WIDEST=call.widest,
            **constants,
        )
        if sums is not None:
            _modality_scores_merge_kernel[(count,)](
                sums,
                prob,
                log_prob,
                weight,
                call.widest,
                splits,
                BLOCK_SIZE=MAX_SPLITS,
                num_warps=MERGE_WARPS,
                **COMPILE_OPTIONS,
            )
    return prob, log_prob, weight
