"""Ratios and coefficients of the modalities, factors of their tensors: one launch."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from ..reference.modulation_factors import CVPR as _CVPR_PLACE
from ..reference.modulation_factors import MLB as _MLB_PLACE
from ..reference.modulation_factors import TPAMI as _TPAMI_PLACE
from ._aot import COMPILE_OPTIONS
from ._tensor_list import launch_on

TPAMI = tl.constexpr(_TPAMI_PLACE)
CVPR = tl.constexpr(_CVPR_PLACE)
MLB = tl.constexpr(_MLB_PLACE)
BLOCK_SIZE = 128
NUM_WARPS = 4


@triton.jit
def _ratio(scores_ptr, m, n_modalities, FORMULA: tl.constexpr):
    """float64 mean over j != m of S_m / S_j, or for MLB S_j / S_m, for a block of modalities m."""
    score = tl.load(scores_ptr + m).to(tl.float64)
    total = tl.zeros_like(score)
    for j in range(n_modalities):
        other = tl.load(scores_ptr + j).to(tl.float64)
        total += tl.where(m == j, 0.0, other if FORMULA == MLB else score / other)
    mean = total / (n_modalities - 1)
    return mean / score if FORMULA == MLB else mean


@triton.jit
def _coefficient(ratio, alpha, beta, FORMULA: tl.constexpr):
    """TPAMI Eq. 11, CVPR Eq. 10 or MLB's; 1 also for a NaN."""
    if FORMULA == CVPR:
        x = tl.where(ratio > 1.0, alpha * ratio, 0.0)
    elif FORMULA == TPAMI:
        x = ratio - 1.0
    else:
        x = alpha * (ratio - 1.0)
    # tanh x to a few units of 2^-53, of 1.
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if FORMULA == MLB:
        k = 1.0 + tl.where(ratio > 1.0, (beta - 1.0) * tanh, tanh)
        return tl.where(k == k, k, 1.0)
    slowed = 1.0 - tanh if FORMULA == CVPR else tl.maximum(1.0 - alpha * tanh, 0.0)
    return tl.where(x > 0.0, slowed, 1.0)


@triton.jit(
    do_not_specialize=[
        *("scores_ptr", "owner_ptr", "numel_ptr", "m2_ptr"),
        *("ratios_ptr", "coefficients_ptr", "scale_ptr", "noise_std_ptr"),
        *("alpha_bits", "beta_bits", "eps_bits", "n_modalities", "n_tensors"),
    ]
)
def _modulation_factors_kernel(
    scores_ptr,
    owner_ptr,
    numel_ptr,
    m2_ptr,
    ratios_ptr,
    coefficients_ptr,
    scale_ptr,
    noise_std_ptr,
    alpha_bits: tl.int64,
    beta_bits: tl.int64,
    eps_bits: tl.int64,
    n_modalities,
    n_tensors,
    FORMULA: tl.constexpr,
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
    ratio = _ratio(scores_ptr, tl.where(is_modality, i, owner), n_modalities, FORMULA)
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)
    number: tl.constexpr = ratios_ptr.dtype.element_ty
    coefficient = _coefficient(ratio, alpha, beta, FORMULA).to(number)
    tl.store(ratios_ptr + i, ratio.to(number), mask=is_modality)
    tl.store(coefficients_ptr + i, coefficient, mask=is_modality)
    factor: tl.constexpr = scale_ptr.dtype.element_ty
    tl.store(scale_ptr + t, coefficient.to(factor), mask=is_tensor)
    if m2_ptr is not None:
        n = tl.load(numel_ptr + t, mask=is_tensor, other=0).to(tl.float64)
        m2 = tl.load(m2_ptr + t, mask=is_tensor, other=0.0).to(tl.float64)
        eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
        std = tl.sqrt(m2 / tl.maximum(n - 1.0, 1.0)) + eps
        std = tl.where(n > 1.0, std, 0.0).to(factor)
        tl.store(noise_std_ptr + t, std, mask=is_tensor)


def modulation_factors(
    scores: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    m2: Tensor | None,
    alpha: float,
    beta: float,
    formula: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mmfuse.ops.modulation_factors`."""
    n_modalities, n_tensors = scores.numel(), owner.numel()
    ratios, coefficients = scores.new_empty(n_modalities), scores.new_empty(n_modalities)
    like = scores if m2 is None else m2
    scale, noise_std = like.new_empty(n_tensors), like.new_empty(0 if m2 is None else n_tensors)
    bits = struct.unpack("<qqq", struct.pack("<ddd", alpha, beta, eps))
    with launch_on(scores.device):
        _modulation_factors_kernel[(triton.cdiv(n_modalities + n_tensors, BLOCK_SIZE),)](
            scores,
            owner,
            numel,
            m2,
            ratios,
            coefficients,
            scale,
            noise_std,
            *bits,
            n_modalities,
            n_tensors,
            FORMULA=formula,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return ratios, coefficients, scale, noise_std
