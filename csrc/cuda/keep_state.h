// keep_state_: bytes of the state, and those that take their place if the step counts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct KeptTensor {
  uint8_t* state;
  const uint8_t* value;
  int64_t bytes;
};

struct KeepStateParams {
  std::vector<KeptTensor> tensors;
  const bool* finite;
  Coefficients sums;  // null: none
  int64_t count;      // of the sums
};

void launch_keep_state(const KeepStateParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
