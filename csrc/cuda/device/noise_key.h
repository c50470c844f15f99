// The noise on a GPU: a NoiseStream's device state, and normal deviates by the Box-Muller
// transform.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/philox.h"

namespace mmfuse::cuda {

// Loads where it is written: the compiler would move it behind a branch that waits for other loads.
__device__ __forceinline__ int64_t load_here(const int64_t* source) {
#ifdef MMFUSE_CUDA_ON_CPU
  return *source;
#else
  int64_t value;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(source));
  return value;
#endif
}

__device__ __forceinline__ NoiseKey load_noise_key(const int64_t* state, uint32_t stream_id) {
  return {static_cast<uint64_t>(load_here(state)), stream_id,
          static_cast<uint32_t>(load_here(state + 1))};
}

struct NormalBlock {
  float z[kNoiseBlock];
};

// The hardware's approximations, for arguments that are not subnormal.
__device__ __forceinline__ float fast_log2(float x) {
#ifdef MMFUSE_CUDA_ON_CPU
  return cuda_on_cpu::fast_log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float fast_sqrt(float x) {
#ifdef MMFUSE_CUDA_ON_CPU
  return cuda_on_cpu::fast_sqrt(x);
#else
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Radius sqrt(-2 ln u) and angle of two deviates. The contract allows 1e-5 (1 + |z|).
//
// The documented errors are 2^-22 for log2 on [1/2, 1] (2 units in the last place below), 1 unit
// for the square root, 2^-21.4 and 2^-21.2 for sine and cosine on [-pi, pi]. Near u = 1 the square
// root would magnify the logarithm's; there a series in v = 1 - u, which is exact, takes its place:
//   v < 2^-6:  -2 ln(1 - v) = v (2 + v + 2/3 v^2), short of v^4 / 2: 5e-7 of it, 9e-8 in r <= 0.18;
//   v >= 2^-6: 2 ln 2 2^-22 = 3.3e-7, so 1e-6 in r >= 0.177, less above, and 2e-7 r for u < 1/2.
// The angle: 0.9e-7 for the integer's rounding, 2.1e-7 for the product's and the constant's, 1.9e-7
// for the rounding of the reference's u, 4.2e-7 for the cosine: 9.1e-7 of a radius of at most 6.77,
// so 6.2e-6.
__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float* z0, float* z1) {
  const float u = uniform_from_bits(a);
  const float v = 1.0f - u;
  const float series = v * fmaf(v, fmaf(v, 2.0f / 3.0f, 1.0f), 2.0f);
  const float radius_sq = v < 0x1p-6f ? series : -1.3862943611198906f * fast_log2(u);
  const float radius = fast_sqrt(radius_sq);
  const float angle =
      static_cast<float>(static_cast<int32_t>(b)) * (6.2831853071795865f * 0x1p-32f);
  *z0 = radius * __cosf(angle);
  *z1 = radius * __sinf(angle);
}

__device__ __forceinline__ NormalBlock normal_block(const PhiloxBlock& bits) {
  NormalBlock out;
  box_muller(bits.x[0], bits.x[1], &out.z[0], &out.z[1]);
  box_muller(bits.x[2], bits.x[3], &out.z[2], &out.z[3]);
  return out;
}

// The four deviates of a block of a tensor.
__device__ __forceinline__ NormalBlock normal_block(const NoiseKey& key, uint64_t block) {
  return normal_block(philox4x32_10(key, block));
}

}  // namespace mmfuse::cuda
