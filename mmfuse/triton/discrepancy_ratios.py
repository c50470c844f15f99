"""Discrepancy ratio of each modality: one launch, one program per modality."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._device import divide
from ._tensor_list import launch_on

BLOCK_SIZE = 64
NUM_WARPS = 1


@triton.jit(do_not_specialize=["n_modalities", "scores_ptr", "ratios_ptr"])
def _discrepancy_ratios_kernel(scores_ptr, ratios_ptr, n_modalities, BLOCK_SIZE: tl.constexpr):
    """Writes the mean over j != m of S_m / S_j for one m.

    Equal scores have 1, beyond which methods begin to act.
    """
    m = tl.program_id(0)
    score = tl.load(scores_ptr + m)
    total = tl.zeros([BLOCK_SIZE], scores_ptr.dtype.element_ty)
    for start in range(0, n_modalities, BLOCK_SIZE):
        j = start + tl.arange(0, BLOCK_SIZE)
        other = (j < n_modalities) & (j != m)
        ratio = divide(score, tl.load(scores_ptr + j, mask=other, other=1.0))
        total += tl.where(other, ratio, 0.0)
    others = (n_modalities - 1).to(score.dtype)
    tl.store(ratios_ptr + m, divide(tl.sum(total, axis=0), others))


def discrepancy_ratios(scores: Tensor) -> Tensor:
    """See `mmfuse.ops.discrepancy_ratios`."""
    ratios = torch.empty_like(scores)
    count = scores.numel()
    if count:
        with launch_on(scores.device):
            _discrepancy_ratios_kernel[(count,)](
                scores,
                ratios,
                count,
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return ratios
