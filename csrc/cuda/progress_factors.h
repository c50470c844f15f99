// progress_factors: CGGM's progress, shares, coefficients, and what these are for each tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/progress.h"
#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct ProgressFactorsParams {
  Coefficients scores;  // [modalities], or a table of them
  bool table;
  int64_t modalities;
  Coefficients last_scores;  // [modalities, modalities]
  Coefficients last_shares;  // [modalities]
  const int64_t* owner;      // [tensors]
  int64_t tensors;
  ProgressRule rule;
  void* scale;  // [tensors]; results, as the others
  bool wide_scale;
  // Like last_scores: [modalities], and what the next step is given.
  void *coefficients, *progress, *shares;
  void *kept_scores, *kept_shares;
};

void launch_progress_factors(const ProgressFactorsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
