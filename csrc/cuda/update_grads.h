// update_grads_: g <- scale*g + pull*(w - w0) + noise_std*N(0, 1), for a list of tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "params.h"

namespace mmfuse::cuda {

// What all tensors of a call share.
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
};

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
