// The sum of many terms in one thread: what rounding takes from it is kept.
#pragma once

#include <cuda_runtime.h>

namespace mmfuse::cuda {

template <typename acc_t>
struct LongSum {
  acc_t sum = 0, low = 0;

  // Adds b exactly; an infinity leaves nothing.
  __device__ __forceinline__ void add(acc_t b) {
    const acc_t before = sum;
    sum = before + b;
    const acc_t grown = sum - before;
    const acc_t rest = (before - (sum - grown)) + (b - grown);
    low += rest == rest ? rest : acc_t(0);
  }
  __device__ __forceinline__ void scale(acc_t factor) {
    sum *= factor;
    low *= factor;
  }
  __device__ __forceinline__ acc_t total() const { return sum + low; }
};

// float64 rounds little enough.
template <>
struct LongSum<double> {
  double sum = 0;

  __device__ __forceinline__ void add(double b) { sum += b; }
  __device__ __forceinline__ void scale(double factor) { sum *= factor; }
  __device__ __forceinline__ double total() const { return sum; }
};

}  // namespace mmfuse::cuda
