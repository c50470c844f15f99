// A sum over many blocks: each leaves its part in a workspace, and one more launch adds the parts,
// in an order that depends on their number alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "element.h"
#include "launch.h"
#include "reduce.h"

namespace mmfuse::cuda {

constexpr int kPartialThreads = 1024;

// Calls finish(sum) in one thread.
template <typename finish_t>
__global__ void __launch_bounds__(kPartialThreads)
    partial_sums_kernel(const double* partials, int64_t count,
                        const finish_t __grid_constant__ finish) {
  double sum[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kPartialThreads) sum[0] += partials[i];
  block_sum<kPartialThreads>(sum);
  if (threadIdx.x == 0) finish(sum[0]);
}

template <typename finish_t>
void launch_partial_sums(const double* partials, int64_t count, const finish_t& finish,
                         cudaStream_t stream) {
  launch("partial_sums_kernel", partial_sums_kernel<finish_t>, 1, kPartialThreads, stream, partials,
         count, finish);
}

}  // namespace mmfuse::cuda
