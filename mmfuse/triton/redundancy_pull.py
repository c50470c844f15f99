"""RedReg's growth, phase and strength, its new state, and each tensor's factors: one launch."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import COMPARING_OPTIONS
from ._device import not_finite
from ._tensor_list import launch_on
from .information_pull import ahead, score_at, tanh_of

BLOCK_SIZE = 128
NUM_WARPS = 4
EPS = 1e-12


@triton.jit
def _number(bits):
    """A float64 from its bits: Triton would round an argument to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _growth(history_ptr, m, h, counts, steps, columns, eps):
    """Growth of the gain, after h has entered the last W + 1 of them if it counts."""
    window = columns - 1
    row = history_ptr + m * columns
    shift = tl.where(counts, 1, 0).to(tl.int64)
    total = tl.zeros_like(h)
    for k in range(window):
        total += tl.load(row + k + shift)
    newest = tl.where(counts, h, tl.load(row + window))
    rate = (newest - tl.load(row + shift)) / (tl.abs(total) + window.to(tl.float64) * eps)
    return tl.where(steps > window, rate, 1.0)


@triton.jit
def _strength(scores_ptr, m, phase, beta, threshold, n_modalities, TABLE: tl.constexpr):
    """The strength of the one modality ahead of all others, if it is redundant; 0 for the rest."""
    total, others = tl.zeros_like(phase), tl.zeros_like(phase)
    first = phase > threshold
    for j in range(n_modalities):
        difference = ahead(scores_ptr, None, m, j, n_modalities, TABLE, False)
        compared = m != j
        if TABLE:
            ours = score_at(scores_ptr, None, m * n_modalities + j, False)
            theirs = score_at(scores_ptr, None, (m * 0 + j) * n_modalities + m, False)
            compared = compared & (ours == ours) & (theirs == theirs)
        first = first & ((difference > 0.0) | (compared == 0))
        total += tl.where(compared, difference, 0.0)
        others += tl.where(compared, 1.0, 0.0)
    regulated = first & (others > 0.0)
    # 0 elsewhere, where the sum leads to nothing: tanh_of is for positive numbers.
    delta = tl.where(regulated, total, 0.0) / tl.maximum(others, 1.0)
    return tl.where(regulated, tl.exp(beta * tanh_of(delta)), 0.0)


@triton.jit
def _square(numel_ptr, mean_ptr, m2_ptr, t, mask):
    """⟨g, g⟩ = m2 + n·mean²."""
    mean = tl.load(mean_ptr + t, mask=mask, other=0.0).to(tl.float64)
    m2 = tl.load(m2_ptr + t, mask=mask, other=0.0).to(tl.float64)
    return m2 + mean * mean * tl.load(numel_ptr + t, mask=mask, other=0).to(tl.float64)


_IN = ("scores", "measured", "gate", "history", "steps", "last", "average", "weight", "owner")
_STATS = ("numel", "mean", "m2", "dot")
_OUT = ("coefficients", "growth", "phase", "later", "counted", "new_last", "new_average")
_NUMBERS = ("momentum_bits", "gamma_bits", "beta_bits", "threshold_bits", "eps_bits")


@triton.jit(
    do_not_specialize=[
        *(f"{name}_ptr" for name in (*_IN, *_STATS, *_OUT, "new_weight", "scale", "pull")),
        *_NUMBERS,
        *("columns", "n_modalities", "n_tensors"),
    ]
)
def _redundancy_pull_kernel(
    scores_ptr,
    measured_ptr,
    gate_ptr,
    history_ptr,
    steps_ptr,
    last_ptr,
    average_ptr,
    weight_ptr,
    owner_ptr,
    numel_ptr,
    mean_ptr,
    m2_ptr,
    dot_ptr,
    coefficients_ptr,
    growth_ptr,
    phase_ptr,
    later_ptr,
    counted_ptr,
    new_last_ptr,
    new_average_ptr,
    new_weight_ptr,
    scale_ptr,
    pull_ptr,
    momentum_bits: tl.int64,
    gamma_bits: tl.int64,
    beta_bits: tl.int64,
    threshold_bits: tl.int64,
    eps_bits: tl.int64,
    columns,
    n_modalities,
    n_tensors,
    TABLE: tl.constexpr,
    UNBIASED: tl.constexpr,
    BY_ENCODER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The first lanes decide about a modality, the others about a tensor, by its owner's scores."""
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    t = i - n_modalities
    is_modality = t < 0
    is_tensor = (t >= 0) & (t < n_tensors)
    owner = tl.load(owner_ptr + t, mask=is_tensor, other=0)
    m = tl.where(is_modality, i, owner)
    momentum, gamma, eps = _number(momentum_bits), _number(gamma_bits), _number(eps_bits)

    h = score_at(scores_ptr, None, m * n_modalities + m if TABLE else m, False)
    counts = not_finite(h) == 0
    steps = tl.load(steps_ptr + m) + tl.where(counts, 1, 0).to(tl.int64)
    last, average = tl.load(last_ptr + m), tl.load(average_ptr + m)
    weight = tl.load(weight_ptr + m)
    if measured_ptr is not None:
        measured = tl.load(measured_ptr + m).to(tl.float64)
        usable = not_finite(measured) == 0
        last = tl.where(counts, measured, last)
        average = tl.where(usable, momentum * average + (1.0 - momentum) * measured, average)
        weight = tl.where(usable, momentum * weight + (1.0 - momentum), weight)
    growth = _growth(history_ptr, m, h, counts, steps, columns, eps)
    used = average / weight if UNBIASED else average
    growing = tl.where(growth < 0.0, 0.0, growth)
    phase = last / (used + eps) - gamma * growing
    beta, threshold = _number(beta_bits), _number(threshold_bits)
    strength = _strength(scores_ptr, m, phase, beta, threshold, n_modalities, TABLE)
    gate = tl.load(gate_ptr).to(tl.float64)
    coefficient = (strength * gate).to(coefficients_ptr.dtype.element_ty)

    tl.store(coefficients_ptr + i, coefficient, mask=is_modality)
    tl.store(growth_ptr + i, growth, mask=is_modality)
    tl.store(phase_ptr + i, phase, mask=is_modality)
    tl.store(counted_ptr + i, steps, mask=is_modality)
    tl.store(new_last_ptr + i, last, mask=is_modality)
    tl.store(new_average_ptr + i, average, mask=is_modality)
    tl.store(new_weight_ptr + i, weight, mask=is_modality)
    for k in range(columns - 1):
        place = m * columns + k
        gain = tl.load(history_ptr + place + tl.where(counts, 1, 0))
        tl.store(later_ptr + place, gain, mask=is_modality)
    newest = m * columns + columns - 1
    gain = tl.where(counts, h, tl.load(history_ptr + newest))
    tl.store(later_ptr + newest, gain, mask=is_modality)
    if dot_ptr is not None:
        number: tl.constexpr = pull_ptr.dtype.element_ty
        pull = coefficient.to(number)
        dot = tl.load(dot_ptr + t, mask=is_tensor, other=0.0).to(tl.float64)
        square = _square(numel_ptr, mean_ptr, m2_ptr, t, is_tensor)
        if BY_ENCODER:
            dot, square = tl.zeros_like(dot), tl.zeros_like(square)
            for u in range(n_tensors):
                mine = tl.load(owner_ptr + u) == owner
                dot += tl.where(mine, tl.load(dot_ptr + u).to(tl.float64), 0.0)
                square += tl.where(mine, _square(numel_ptr, mean_ptr, m2_ptr, u, True), 0.0)
        wide = pull.to(tl.float64)
        scale = tl.where(wide == 0.0, 1.0, 1.0 - wide * (dot / (square + eps)))
        tl.store(pull_ptr + t, pull, mask=is_tensor)
        tl.store(scale_ptr + t, scale.to(number), mask=is_tensor)


def redundancy_pull(
    scores: Tensor,
    redundancy: Tensor | None,
    gate: Tensor,
    history: Tensor,
    steps: Tensor,
    last: Tensor,
    average: Tensor,
    weight: Tensor,
    owner: Tensor,
    numel: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    dot: Tensor | None,
    momentum: float,
    gamma: float,
    beta: float,
    threshold: float,
    unbiased: bool,
    by_encoder: bool,
) -> tuple[Tensor, ...]:
    """See `mmfuse.ops.redundancy_pull`."""
    n_modalities = scores.shape[0]
    like, n_tensors = (scores, 0) if dot is None else (dot, owner.numel())
    coefficients = scores.new_empty(n_modalities)
    growth, phase = torch.empty_like(last), torch.empty_like(last)
    state = [torch.empty_like(x) for x in (history, steps, last, average, weight)]
    scale, pull = like.new_empty(n_tensors), like.new_empty(n_tensors)
    numbers = momentum, gamma, beta, threshold, EPS
    with launch_on(scores.device):
        _redundancy_pull_kernel[(triton.cdiv(n_modalities + n_tensors, BLOCK_SIZE),)](
            scores,
            redundancy,
            gate,
            history,
            steps,
            last,
            average,
            weight,
            owner,
            numel,
            mean,
            m2,
            dot,
            coefficients,
            growth,
            phase,
            *state,
            scale,
            pull,
            *struct.unpack("<5q", struct.pack("<5d", *numbers)),
            history.shape[1],
            n_modalities,
            n_tensors,
            TABLE=scores.dim() == 2,
            UNBIASED=unbiased,
            BY_ENCODER=by_encoder,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **COMPARING_OPTIONS,
        )
    return coefficients, growth, phase, *state, scale, pull
