"""The noise of the whole library as device functions: the same steps as csrc/common/philox.h.

Philox4x32-10 (Salmon et al., SC 2011), then Box-Muller with polynomials of our own: the hardware's
fast logarithm has an absolute error near 1, which sqrt(-2 ln u) would magnify.
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)

_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_TWO_PI = tl.constexpr(6.2831853071795865)

# Elements of a flattened tensor that share one Philox block.
NOISE_BLOCK = tl.constexpr(4)


@triton.jit
def _philox4x32_10(seed, block, stream_id, step):
    """Four random words per 64-bit block index; seed, stream_id and step are int64 scalars."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    x0 = block.to(tl.uint32)
    x1 = (block >> 32).to(tl.uint32)
    x2 = stream_id.to(tl.uint32)
    x3 = step.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        # One wide multiplication, where tl.umulhi and a product would be two.
        p0 = x0.to(tl.uint64) * _M0
        p1 = x2.to(tl.uint64) * _M1
        x0 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0
        x1 = p1.to(tl.uint32)
        x2 = (p0 >> 32).to(tl.uint32) ^ x3 ^ k1
        x3 = p0.to(tl.uint32)
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def _uniform_from_bits(x):
    """float32 in [2^-33, 1]: never 0, so that the logarithm is finite."""
    return tl.fma(x.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def _log_normal_range(u):
    """ln(u) for normal u > 0, with a relative error under 2 ulp also near u = 1."""
    # Split u = 2^e * m with m in [sqrt(1/2), sqrt(2)).
    bits = u.to(tl.uint32, bitcast=True)
    shifted = tl.sub(bits, _SQRT_HALF_BITS, sanitize_overflow=False)
    e = (shifted.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    m_bits = tl.add(shifted & 0x007FFFFF, _SQRT_HALF_BITS, sanitize_overflow=False)
    f = m_bits.to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    # Minimax polynomial of (ln(1 + f) - f + f^2/2) / f^3 (Cephes, single precision).
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    y = f * f2 * p
    y = tl.fma(e, -2.12194440e-4, y)  # ln 2 in two parts: 0.693359375 - 2.12194440e-4
    y = tl.fma(f2, -0.5, y)
    return tl.fma(e, 0.693359375, f + y)


@triton.jit
def _cos_sin_turn(u):
    """(cos, sin) of 2 pi u for u in [0, 1]; the quadrant is removed before any rounding."""
    q = tl.floor(tl.fma(u, 4.0, 0.5))
    x = tl.fma(q, -0.25, u) * _TWO_PI
    x2 = x * x
    s = tl.fma(x2, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(s, x2, -1.6666654611e-1)
    s = tl.fma(s * x2, x, x)
    c = tl.fma(x2, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(c, x2, 4.166664568298827e-2)
    c = tl.fma(c * x2, x2, tl.fma(x2, -0.5, 1.0))
    quadrant = q.to(tl.int32) & 3
    odd = (quadrant & 1) != 0
    cos_abs = tl.where(odd, s, c)
    sin_abs = tl.where(odd, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos_abs, cos_abs)
    sin = tl.where(quadrant >= 2, -sin_abs, sin_abs)
    return cos, sin


@triton.jit
def _box_muller(a, b):
    r = tl.sqrt(-2.0 * _log_normal_range(_uniform_from_bits(a)))
    cos, sin = _cos_sin_turn(_uniform_from_bits(b))
    return r * cos, r * sin


@triton.jit
def normal_tile(seed, stream_id, step, first_block, N_BLOCKS: tl.constexpr):
    """Standard normal numbers of consecutive Philox blocks, one Philox call per four elements.

    Args:
        seed: int64 scalar.
        stream_id: int64 scalar, of which 32 bits count.
        step: int64 scalar, of which 32 bits count.
        first_block: int64 scalar, index of the first element divided by four.
        N_BLOCKS: A power of two.

    Returns:
        [4 * N_BLOCKS] float32.
    """
    block = first_block + tl.arange(0, N_BLOCKS)
    x0, x1, x2, x3 = _philox4x32_10(seed, block, stream_id, step)
    z0, z1 = _box_muller(x0, x1)
    z2, z3 = _box_muller(x2, x3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
