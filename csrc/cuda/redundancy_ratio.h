// redundancy_ratio: mean (z1 - z2)^2, relative to that of the inputs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Elements that one block adds up, a function of the size alone: small representations are spread
// over more blocks, large ones leave fewer parts.
inline int redundancy_chunk(int64_t numel) { return numel > 4 * 1024 * 1024 ? 8192 : 2048; }

struct RedundancyRatioParams {
  const void* z1;
  const void* z2;
  int64_t numel;
  DType dtype;
  Coefficients input_sq;
  double* partials;  // [chunk_count(numel, redundancy_chunk(numel))]
  void* ratio;       // float64 if z1 is, else float32
};

void launch_redundancy_ratio(const RedundancyRatioParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
