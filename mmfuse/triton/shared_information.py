"""Information that variables share with a target: joint histograms, and one launch after them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPILE_OPTIONS
from ._problems import split_problems
from ._tensor_list import launch_on
from .joint_entropies import count_tuples, row_ranges

BLOCK_SIZE = 64
NUM_WARPS = 2


@triton.jit
def _normalised(twice_mi, total):
    """2 I over the sum of both entropies, in [0, 1]; 0 where both are rounding errors."""
    share = twice_mi / tl.where(total <= 2.0**-44, total + 1.0, total)
    # A NaN is in neither comparison.
    return tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))


@triton.jit(do_not_specialize=["n_variables", "n_problems"])
def _shared_information_kernel(
    nmi_ptr,
    ncmi_ptr,
    pairs_ptr,
    triples_ptr,
    n_variables,
    n_problems,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes what m shares with the target given j, and on the diagonal what it does alone."""
    # One axis: another may have 65,535 programs only, fewer than there may be problems or pairs.
    n_places = n_variables * n_variables
    place = tl.program_id(0) % n_places
    m = place // n_variables
    j = place % n_variables
    block = tl.program_id(0) // n_places
    p = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    used = p < n_problems
    own_ptrs = ncmi_ptr + place.to(tl.int64) * n_problems + p
    if m == j:
        row = m.to(tl.int64) * n_problems + p
        h_m = tl.load(pairs_ptr + row * 3, mask=used, other=1.0)
        h_c = tl.load(pairs_ptr + row * 3 + 1, mask=used, other=1.0)
        h_mc = tl.load(pairs_ptr + row * 3 + 2, mask=used, other=1.0)
        share = _normalised(2.0 * (h_m + h_c - h_mc), h_m + h_c)
        tl.store(nmi_ptr + row, share, mask=used)
        tl.store(own_ptrs, 0.0 * share, mask=used)  # or NaN
    else:
        low = tl.minimum(m, j)
        high = tl.maximum(m, j)
        tuple_index = low * (2 * n_variables - low - 1) // 2 + high - low - 1
        row_ptrs = triples_ptr + (tuple_index.to(tl.int64) * n_problems + p) * 7
        # H(low), H(high), H(low, high), H(c), H(low, c), H(high, c), H(low, high, c).
        forth = m < j
        h_j = tl.load(row_ptrs + tl.where(forth, 1, 0), mask=used, other=1.0)
        h_mj = tl.load(row_ptrs + 2, mask=used, other=1.0)
        h_jc = tl.load(row_ptrs + tl.where(forth, 5, 4), mask=used, other=1.0)
        h_mjc = tl.load(row_ptrs + 6, mask=used, other=1.0)
        share = _normalised(2.0 * (h_mj + h_jc - h_mjc - h_j), h_mj + h_jc - 2.0 * h_j)
        tl.store(own_ptrs, share, mask=used)


def shared_information(
    data: Sequence[Tensor], bins: int, conditional_bins: int
) -> tuple[Tensor, Tensor]:
    """See `mmfuse.ops.shared_information`; the last of `data` is the target."""
    device, c = data[0].device, len(data) - 1
    n_problems = data[0].shape[0]
    split = split_problems(*data[0].shape)
    nmi = torch.empty(c, n_problems, dtype=torch.float64, device=device)
    ncmi = torch.empty(c, c, n_problems, dtype=torch.float64, device=device)
    with launch_on(device):
        ranges = row_ranges(data, split)
        of_pairs = [k for m in range(c) for k in (m, c)]
        pairs, _ = count_tuples(data, ranges, split, of_pairs, 2, bins)
        triples = pairs  # read nowhere where there is one variable
        if c > 1:
            of_triples = [k for m, j in combinations(range(c), 2) for k in (m, j, c)]
            triples, _ = count_tuples(data, ranges, split, of_triples, 3, conditional_bins)
        _shared_information_kernel[(c * c * triton.cdiv(n_problems, BLOCK_SIZE),)](
            nmi,
            ncmi,
            pairs,
            triples,
            c,
            n_problems,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return nmi, ncmi
