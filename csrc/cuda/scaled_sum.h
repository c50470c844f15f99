// scaled_sum: the sum of two tensors, the second one scaled.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmfuse::cuda {

struct ScaledSumParams {
  const void* a;
  const void* b;
  const void* factor;
  void* out;
  int64_t numel;
  bool wide;  // float64 rather than float32
};

void launch_scaled_sum(const ScaledSumParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
