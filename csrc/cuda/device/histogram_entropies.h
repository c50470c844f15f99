// The entropies of a histogram of two or three variables, and of all its margins, by one block.
#pragma once

#include <cuda_runtime.h>

#include "reduce.h"

namespace mmfuse::cuda {

// How many sums the margins of a histogram have.
__host__ __device__ inline int margin_values(int order, int bins) {
  return order == 2 ? 2 * bins : 3 * bins * bins + 3 * bins;
}

// Adds up runs of `length` entries that lie `stride` apart:
// out[a * stride + s] = sum over t of source[(a * length + t) * stride + s].
template <int kThreads, typename count_t>
__device__ __forceinline__ void sum_runs(const count_t* source, int runs, int length, int stride,
                                         double* out) {
  if (stride == 1) {
    for (int a = threadIdx.x / kWarpSize; a < runs; a += kThreads / kWarpSize) {
      double sum = 0;
      for (int t = threadIdx.x % kWarpSize; t < length; t += kWarpSize) {
        sum += static_cast<double>(source[a * length + t]);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % kWarpSize == 0) out[a] = sum;
    }
    return;
  }
  for (int i = threadIdx.x; i < runs * stride; i += kThreads) {
    const count_t* run = source + i / stride * length * stride + i % stride;
    double sum = 0;
#pragma unroll 4
    for (int t = 0; t < length; ++t) sum += static_cast<double>(run[t * stride]);
    out[i] = sum;
  }
}

// ln n - sum c ln c / n over the block; NaN without a count.
template <int kThreads, typename count_t>
__device__ __forceinline__ void store_entropy(const count_t* counts, int cells, double* out) {
  double sums[2] = {0, 0};
  for (int i = threadIdx.x; i < cells; i += kThreads) {
    const double c = static_cast<double>(counts[i]);
    if (c == 0) continue;
    sums[0] += c * log(c);
    sums[1] += c;
  }
  block_sum<kThreads>(sums);
  if (threadIdx.x == 0) {
    const double entropy = log(sums[1]) - sums[0] / sums[1];
    *out = entropy < 0 ? 0 : entropy;
  }
}

// The 2^order - 1 entropies of one histogram; `margins` has room for margin_values.
template <int kThreads, typename count_t>
__device__ __forceinline__ void store_entropies(const count_t* counts, int order, int bins,
                                                double* margins, double* out) {
  const int plane = bins * bins;
  const int full = (1 << order) - 1;
  // Pairs of a triple come first: without 2, 1 and 0.
  double* const single = order == 2 ? margins : margins + 3 * plane;
  if (order == 2) {
    sum_runs<kThreads>(counts, bins, bins, 1, single);
    sum_runs<kThreads>(counts, 1, bins, bins, single + bins);
  } else {
    sum_runs<kThreads>(counts, plane, bins, 1, margins);
    sum_runs<kThreads>(counts, bins, bins, bins, margins + plane);
    sum_runs<kThreads>(counts, 1, bins, plane, margins + 2 * plane);
    __syncthreads();
    sum_runs<kThreads>(margins, bins, bins, 1, single);
    sum_runs<kThreads>(margins, 1, bins, bins, single + bins);
    sum_runs<kThreads>(margins + 2 * plane, 1, bins, bins, single + 2 * bins);
  }
  __syncthreads();
#pragma unroll 1
  for (int mask = 1; mask < full; ++mask) {
    const bool pair = mask == 3 || mask > 4;
    const double* margin = pair ? margins + (mask / 2 - 1) * plane : single + mask / 2 * bins;
    store_entropy<kThreads>(margin, pair ? plane : bins, out + mask - 1);
  }
  store_entropy<kThreads>(counts, order == 2 ? plane : plane * bins, out + full - 1);
}

}  // namespace mmfuse::cuda
