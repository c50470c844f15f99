// discrepancy_ratios: the mean over j != m of S_m / S_j.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmfuse::cuda {

struct DiscrepancyRatiosParams {
  const void* scores;
  void* ratios;
  int64_t modalities;
  bool wide;  // float64 rather than float32
};

void launch_discrepancy_ratios(const DiscrepancyRatiosParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
