"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from . import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """Converts loaded elements to the accumulator's type, exactly."""
    if x.dtype == tl.bfloat16:
        # The bits are cut, because the interpreter's own conversion loses subnormal numbers.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(ACC)
    return x.to(ACC)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Converts accumulator values to the stored type, to the nearest, ties to even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        # The interpreter's own conversion truncates; the GPU's instruction rounds.
        bits = x.to(tl.uint32, bitcast=True)
        half = tl.add(0x7FFF, (bits >> 16) & 1, sanitize_overflow=False)
        rounded = tl.add(bits, half, sanitize_overflow=False) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def not_finite(x):
    """True where x is NaN or infinite."""
    return (tl.abs(x) < float("inf")) == 0


@triton.jit
def add_exactly(x, total, low):
    """`total` + x, and `low` + what rounding takes from that; an infinity leaves nothing."""
    after = total + x
    grown = after - total
    rest = (total - (after - grown)) + (x - grown)
    return after, low + tl.where(rest == rest, rest, 0.0)


@triton.jit
def divide(x, y):
    """The nearest number to x / y: float32's fast quotient may be 2 units off, of 1 too."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y
