// The random bits of the whole library: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011). No torch, no CUDA header: the same text serves g++, nvcc and the host
// shim, so that every backend draws the same numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mmfuse {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Elements of a flattened tensor that share one Philox block.
constexpr int kNoiseBlock = 4;

// Elements that share the upper word of their block's number.
constexpr int64_t kNoiseSpan = kNoiseBlock * (int64_t{1} << 32);

// The data with which a kernel draws the noise of one tensor; read from NoiseStream's device
// tensor (seed, step) and from the tensor's place in its method.
struct NoiseKey {
  uint64_t seed;
  uint32_t stream_id;
  uint32_t step;
};

struct PhiloxBlock {
  uint32_t x[4];
};

struct Product {
  uint32_t low;
  uint32_t high;
};

// One instruction on a GPU, where the plain expression becomes a 64 x 64 bit product.
MMFUSE_HD Product multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
#if defined(__CUDA_ARCH__)
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  product = static_cast<uint64_t>(a) * b;
#endif
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
}

// Shared by all blocks of a tensor with the same upper counter word: the round keys, and the first
// three rounds as far as they do not see the lower word.
struct PhiloxConstants {
  uint32_t x2_first, x0_second, x2_second, x2_third;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

MMFUSE_HD PhiloxConstants philox_constants(const NoiseKey& key, uint32_t block_high) {
  PhiloxConstants c;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    c.k0[round] = static_cast<uint32_t>(key.seed) + round * kPhiloxW0;
    c.k1[round] = static_cast<uint32_t>(key.seed >> 32) + round * kPhiloxW1;
  }
  const Product p1 = multiply_wide(kPhiloxM1, key.stream_id);
  const Product p0 = multiply_wide(kPhiloxM0, p1.high ^ block_high ^ c.k0[0]);
  c.x2_first = key.step ^ c.k1[0];
  c.x0_second = p1.low ^ c.k0[1];
  c.x2_second = p0.high ^ c.k1[1];
  c.x2_third = p0.low ^ c.k1[2];
  return c;
}

MMFUSE_HD PhiloxBlock philox4x32_10(const PhiloxConstants& c, uint32_t block_low) {
  Product p0 = multiply_wide(kPhiloxM0, block_low);
  Product p1 = multiply_wide(kPhiloxM1, p0.high ^ c.x2_first);
  uint32_t x0 = p1.high ^ c.x0_second;
  uint32_t x1 = p1.low;
  uint32_t x2 = p0.low ^ c.x2_second;
  p0 = multiply_wide(kPhiloxM0, x0);
  p1 = multiply_wide(kPhiloxM1, x2);
  x0 = p1.high ^ x1 ^ c.k0[2];
  x1 = p1.low;
  x2 = p0.high ^ c.x2_third;
  uint32_t x3 = p0.low;
#if defined(__CUDACC__)  // to other compilers an unknown pragma
#pragma unroll
#endif
  for (int round = 3; round < kPhiloxRounds; ++round) {
    p0 = multiply_wide(kPhiloxM0, x0);
    p1 = multiply_wide(kPhiloxM1, x2);
    x0 = p1.high ^ x1 ^ c.k0[round];
    x1 = p1.low;
    x2 = p0.high ^ x3 ^ c.k1[round];
    x3 = p0.low;
  }
  return {{x0, x1, x2, x3}};
}

MMFUSE_HD PhiloxBlock philox4x32_10(const NoiseKey& key, uint64_t block) {
  return philox4x32_10(philox_constants(key, static_cast<uint32_t>(block >> 32)),
                       static_cast<uint32_t>(block));
}

// u in [2^-33, 1]: never 0, so the logarithm below is finite.
MMFUSE_HD float uniform_from_bits(uint32_t x) {
  return fmaf(static_cast<float>(x), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

}  // namespace mmfuse
