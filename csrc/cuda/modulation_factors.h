// modulation_factors: discrepancy ratios, coefficients, and what they and the noise are for each
// tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/modulation.h"
#include "cuda/device/params.h"

namespace mmfuse::cuda {

// float32 or float64 results.
struct Numbers {
  void* values;
  bool wide;  // float64
};

struct ModulationFactorsParams {
  Coefficients scores;
  int64_t modalities;
  const int64_t* owner;  // [tensors]
  int64_t tensors;
  const int64_t* numel;  // [tensors]
  Coefficients m2;       // null: without noise
  ModulationRule rule;
  double eps;
  Numbers found;    // [2, modalities]: ratios, coefficients
  Numbers factors;  // [1 or 2, tensors]: scale, noise's standard deviation
};

void launch_modulation_factors(const ModulationFactorsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
