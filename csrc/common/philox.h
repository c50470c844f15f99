// The noise of the whole library: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011) followed by the Box-Muller transform. No torch, no CUDA header: the same
// text serves g++, nvcc and the host shim, so that every backend draws the same numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMFUSE_HD __host__ __device__ __forceinline__
#else
#define MMFUSE_HD inline
#endif

namespace mmfuse {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Elements of a flattened tensor that share one Philox block.
constexpr int kNoiseBlock = 4;

// What a kernel needs to know to draw the noise of one tensor; read from NoiseStream's device
// tensor (seed, step) and from the tensor's place in its method.
struct NoiseKey {
  uint64_t seed;
  uint32_t stream_id;
  uint32_t step;
};

struct PhiloxBlock {
  uint32_t x[4];
};

struct NormalBlock {
  float z[4];
};

MMFUSE_HD PhiloxBlock philox4x32_10(uint64_t seed, uint64_t block, uint32_t stream_id,
                                    uint32_t step) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = static_cast<uint32_t>(block);
  uint32_t x1 = static_cast<uint32_t>(block >> 32);
  uint32_t x2 = stream_id;
  uint32_t x3 = step;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{x0, x1, x2, x3}};
}

// u in [2^-33, 1]: never 0, so the logarithm below is finite.
MMFUSE_HD float uniform_from_bits(uint32_t x) {
  return fmaf(static_cast<float>(x), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

// ln(u) for normal u > 0. Relative error under 2 ulp also near u = 1, where sqrt(-2 ln u) would
// magnify an absolute error; this is what rules out the hardware's fast logarithm.
MMFUSE_HD float log_normal_range(float u) {
  uint32_t bits;
  memcpy(&bits, &u, sizeof bits);
  // Split u = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = bits - 0x3F3504F3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const uint32_t m_bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
  float m;
  memcpy(&m, &m_bits, sizeof m);
  const float f = m - 1.0f;
  const float f2 = f * f;
  // Minimax polynomial of (ln(1 + f) - f + f^2/2) / f^3 (Cephes, single precision).
  float p = 7.0376836292e-2f;
  p = fmaf(p, f, -1.1514610310e-1f);
  p = fmaf(p, f, 1.1676998740e-1f);
  p = fmaf(p, f, -1.2420140846e-1f);
  p = fmaf(p, f, 1.4249322787e-1f);
  p = fmaf(p, f, -1.6668057665e-1f);
  p = fmaf(p, f, 2.0000714765e-1f);
  p = fmaf(p, f, -2.4999993993e-1f);
  p = fmaf(p, f, 3.3333331174e-1f);
  float y = f * f2 * p;
  y = fmaf(e, -2.12194440e-4f, y);  // ln 2 in two parts: 0.693359375 - 2.12194440e-4
  y = fmaf(f2, -0.5f, y);
  return fmaf(e, 0.693359375f, f + y);
}

// (cos, sin) of 2*pi*u for u in [0, 1]; the quadrant is removed exactly before any rounding.
MMFUSE_HD void cos_sin_turn(float u, float* cos_out, float* sin_out) {
  const float q = floorf(fmaf(u, 4.0f, 0.5f));
  const float x = fmaf(q, -0.25f, u) * 6.2831853071795865f;
  const float x2 = x * x;
  float s = -1.9515295891e-4f;
  s = fmaf(s, x2, 8.3321608736e-3f);
  s = fmaf(s, x2, -1.6666654611e-1f);
  s = fmaf(s * x2, x, x);
  float c = 2.443315711809948e-5f;
  c = fmaf(c, x2, -1.388731625493765e-3f);
  c = fmaf(c, x2, 4.166664568298827e-2f);
  c = fmaf(c * x2, x2, fmaf(x2, -0.5f, 1.0f));
  const int quadrant = static_cast<int>(q) & 3;
  const float cos_abs = (quadrant & 1) ? s : c;
  const float sin_abs = (quadrant & 1) ? c : s;
  *cos_out = (quadrant == 1 || quadrant == 2) ? -cos_abs : cos_abs;
  *sin_out = (quadrant >= 2) ? -sin_abs : sin_abs;
}

MMFUSE_HD void box_muller(uint32_t a, uint32_t b, float* z0, float* z1) {
  const float r = sqrtf(-2.0f * log_normal_range(uniform_from_bits(a)));
  float c, s;
  cos_sin_turn(uniform_from_bits(b), &c, &s);
  *z0 = r * c;
  *z1 = r * s;
}

// The four normal deviates of one block of a tensor.
MMFUSE_HD NormalBlock normal_block(const NoiseKey& key, uint64_t block) {
  const PhiloxBlock bits = philox4x32_10(key.seed, block, key.stream_id, key.step);
  NormalBlock out;
  box_muller(bits.x[0], bits.x[1], &out.z[0], &out.z[1]);
  box_muller(bits.x[2], bits.x[3], &out.z[2], &out.z[3]);
  return out;
}

}  // namespace mmfuse
