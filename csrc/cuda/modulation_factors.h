// modulation_factors: ratios, coefficients, and what they and the noise are for each tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/modulation.h"
#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct ModulationFactorsParams {
  Coefficients scores;
  int64_t modalities;
  const int64_t* owner;  // [tensors]
  int64_t tensors;
  const int64_t* numel;  // [tensors]
  Coefficients m2;       // null: without noise
  ModulationRule rule;
  double eps;
  // Results: of the scores' type, for each modality; and for each tensor, float64 or float32.
  void *ratios, *coefficients;
  void *scale, *noise_std;
  bool wide_factors;
  // For the update that follows, null where nobody wants them: true, and 0 blocks that are done.
  bool* finite;
  int32_t* done;
};

void launch_modulation_factors(const ModulationFactorsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
