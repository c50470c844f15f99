"""The noise of mmfuse in PyTorch: Philox4x32-10 and Box-Muller.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter is
(element block low, element block high, stream id, step), the key is the 64-bit seed. The uniform
numbers are float32; what follows is float64, where the device has it, so that this is the value
which the float32 arithmetic of the other backends approximates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._devices import WIDE

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x; int64 wraps modulo 2^64, which keeps the bits."""
    product = x * constant
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: Four words per block, [..., 4] int64 holding 32-bit values.
        key: Two words, [2] int64 holding 32-bit values.

    Returns:
        [..., 4] int64 holding 32-bit values.
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, x0)
        high1, low1 = _multiply(_M1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack([x0, x1, x2, x3], dim=-1)


def uniform_from_bits(bits: Tensor) -> Tensor:
    """float32 in [2^-33, 1]: one rounding to float32, then fma(x, 2^-32, 2^-33)."""
    return bits.to(torch.float32) * 2.0**-32 + 2.0**-33


def standard_uniform(state: Tensor, numel: int, stream_id: int, offset: int = 0) -> Tensor:
    """Uniform numbers of elements offset … offset + numel of the tensor `stream_id`.

    Args:
        state: [2] int64, (seed, step).
        numel: How many elements.
        stream_id: Which parameter.
        offset: Index of the first element in the flattened whole tensor.

    Returns:
        [numel] float32 in [2^-33, 1] on the device of `state`.
    """
    first_block = offset // 4
    blocks = torch.arange(
        first_block, (offset + numel + 3) // 4, dtype=torch.int64, device=state.device
    )
    seed, step = state.unbind()
    fixed = torch.stack([torch.full_like(step, stream_id), step]) & _MASK
    counter = torch.stack(
        [blocks & _MASK, blocks >> 32, *(w.expand_as(blocks) for w in fixed)], dim=-1
    )
    bits = philox4x32(counter, torch.stack([seed, seed >> 32]) & _MASK)
    start = offset - 4 * first_block
    return uniform_from_bits(bits).flatten()[start : start + numel]


def standard_normal(state: Tensor, numel: int, stream_id: int, offset: int = 0) -> Tensor:
    """Normal deviates of the same elements, from pairs of the uniform numbers.

    [numel] float64, or float32 on a device that lacks it.
    """
    lead = offset % 4
    whole = lead + numel + -(lead + numel) % 4
    u = standard_uniform(state, whole, stream_id, offset - lead).to(WIDE[state.device.type])
    u = u.view(-1, 4)
    radius = (-2.0 * u[:, 0::2].log()).sqrt()
    angle = 2.0 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return z.flatten()[lead : lead + numel]
