// information_pull: InfoReg's gap, strength, and what they are for each tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct InformationPullParams {
  Coefficients scores;  // [modalities], or a table of them
  bool table;
  int64_t modalities;
  Coefficients counts;  // one, or as many as scores; null: 1
  bool one_count;
  const bool* open;      // [modalities]
  const int64_t* steps;  // [modalities]
  const int64_t* owner;  // [tensors]
  int64_t tensors;
  double beta;
  Coefficients multipliers;  // [modalities]; null: 1
  void* coefficients;        // [modalities], like scores
  double* gap;               // [modalities]
  int64_t* counted;          // [modalities]
  void* scale;               // [tensors], like scores
  void* pull;                // [tensors], like scores
};

void launch_information_pull(const InformationPullParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
