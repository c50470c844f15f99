"""True if the modalities agree: one launch per pair of features, and one that decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._partials import MERGE_BLOCK, MERGE_WARPS, accumulator, mean_of
from ._tensor_list import launch_on
from .paired_cosine import split_rows, sum_cosines


@triton.jit(do_not_specialize=["partials_ptr", "threshold_ptr", "gate_ptr", "n_partials", "count"])
def _co_information_gate_kernel(
    partials_ptr,
    threshold_ptr,
    gate_ptr,
    n_partials,
    count: tl.int64,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes 1 if the mean of all cosines is above the threshold, else 0, also for a NaN."""
    ACC: tl.constexpr = gate_ptr.dtype.element_ty
    mean = mean_of(partials_ptr, n_partials, count, BLOCK_SIZE).to(ACC)
    tl.store(gate_ptr, (mean > tl.load(threshold_ptr)).to(ACC))


def co_information_gate(features: Sequence[Tensor], threshold: Tensor) -> Tensor:
    """See `mmfuse.ops.co_information_gate`."""
    device = features[0].device
    pairs = list(combinations(features, 2))
    split = split_rows(features[0])
    partials = torch.empty((len(pairs), split.programs), dtype=torch.float64, device=device)
    for (a, b), sums in zip(pairs, partials.unbind(0), strict=True):
        sum_cosines(a, b, split, sums)
    gate = torch.empty((), dtype=accumulator(features[0]), device=device)
    with launch_on(device):
        _co_information_gate_kernel[(1,)](
            partials,
            threshold,
            gate,
            partials.numel(),
            len(pairs) * features[0].shape[0],
            BLOCK_SIZE=MERGE_BLOCK,
            num_warps=MERGE_WARPS,
            **COMPILE_OPTIONS,
        )
    return gate
