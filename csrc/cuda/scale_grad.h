// scale_grad_backward: coefficient*grad + noise_std*N(0, 1), into a new tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct ScaleGradParams {
  const void* grad;
  void* out;
  int64_t numel;
  DType dtype;
  Coefficients coefficient;
  Coefficients noise_std;
  const int64_t* noise_state;  // seed, step
  uint32_t noise_id;
  int64_t noise_offset;
};

void launch_scale_grad_backward(const ScaleGradParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
