// noisy_views: x + sigma*N(0, 1) twice, and the mean squared difference of what was stored.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Elements that one block makes; the partition of a tensor depends on nothing but its size, so that
// the order of the sum does not either.
constexpr int kViewsChunk = 4096;

struct NoisyView {
  void* out;
  int64_t noise_offset;
  uint32_t noise_id;
};

struct NoisyViewsParams {
  const void* x;
  NoisyView views[2];
  int64_t numel;
  DType dtype;
  double sigma;
  const int64_t* noise_state;  // seed, step
  double* partials;            // [chunk_count(numel, kViewsChunk)]
  void* input_sq;              // float64 if x is, else float32
};

void launch_noisy_views(const NoisyViewsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
