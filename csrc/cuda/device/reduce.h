// Sums over a warp and over a block, in an order that never changes.
#pragma once

#include <cuda_runtime.h>

namespace mmfuse::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

template <typename acc_t>
__device__ __forceinline__ acc_t warp_sum(acc_t x) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    x += __shfl_xor_sync(kFullMask, x, delta);
  }
  return x;
}

// A NaN is passed over here; callers find it in the sums that follow.
template <typename acc_t>
__device__ __forceinline__ acc_t warp_max(acc_t x) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    const acc_t other = __shfl_xor_sync(kFullMask, x, delta);
    x = other > x ? other : x;
  }
  return x;
}

// Replaces each of the kCount values by its sum over the block, in every thread.
template <int kThreads, int kCount, typename acc_t>
__device__ __forceinline__ void block_sum(acc_t (&values)[kCount]) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ acc_t partial[kCount][kWarps];
  __syncthreads();  // the previous call's sums have been read
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const acc_t sum = warp_sum(values[k]);
    if (threadIdx.x % kWarpSize == 0) partial[k][threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = warp_sum(lane < kWarps ? partial[k][lane] : acc_t(0));
  }
}

}  // namespace mmfuse::cuda
