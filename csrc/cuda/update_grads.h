// update_grads_: g <- scale*g + pull*(w - w0) + noise_std*N(0, 1), for a list of tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Shared by all tensors of a call.
struct UpdateCommon {
  Coefficients scale;
  Coefficients pull;
  Coefficients noise_std;
  const int64_t* noise_state = nullptr;  // seed, step
  bool* finite = nullptr;
};

struct UpdateGradsParams {
  std::vector<GradTensor> tensors;
  UpdateCommon common;
  void* sq_norm = nullptr;      // [T], or null where the sums are not wanted
  bool wide_sq_norm = false;    // it is float64
  double* partials = nullptr;   // [update_chunks(tensors)] for them
  int64_t* advanced = nullptr;  // a stream's step, which becomes the next one if all is finite
};

inline int64_t update_chunks(const std::vector<GradTensor>& tensors) {
  int64_t chunks = 0;
  for (const GradTensor& tensor : tensors) chunks += chunk_count(tensor.numel, kUpdateChunk);
  return chunks;
}

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
