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
  // For the last of `blocks` blocks with noise, where these are counted: `done`, from 0 on, and the
  // stream's step, which becomes the next one if all is finite.
  int32_t* done = nullptr;
  int32_t blocks = 0;
  int64_t* step = nullptr;
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

// Of the launches with noise, whose blocks have a chunk or a tile each.
inline int64_t noisy_blocks(const std::vector<GradTensor>& tensors) {
  int64_t blocks = 0;
  for (const GradTensor& tensor : tensors) {
    blocks +=
        tensor.channels > 1 ? transposed_tiles(tensor) : chunk_count(tensor.numel, kUpdateChunk);
  }
  return blocks;
}

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
