// redundancy_pull: RedReg's growth, phase, strength, its new state, and each tensor's factors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/redundancy.h"
#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct RedundancyPullParams {
  Coefficients scores;  // [modalities], or a table of them
  bool table;
  int64_t modalities;
  Coefficients measured;  // [modalities]; null: no monitor
  Coefficients gate;      // one
  const double* history;  // [modalities, columns]
  int64_t columns;
  const int64_t* steps;  // [modalities]
  Redundancies old;      // [modalities]
  const int64_t* owner;  // [tensors]
  int64_t tensors;       // 0 without statistics
  const int64_t* numel;  // [tensors]
  Coefficients mean;     // [tensors], as are those that follow
  Coefficients m2;
  Coefficients dot;
  RedundancyRule rule;
  bool by_encoder;
  void* coefficients;  // [modalities], like scores
  double* growth;      // [modalities], as are those that follow
  double* phase;
  double* later;  // [modalities, columns]
  int64_t* counted;
  double* last;
  double* average;
  double* weight;
  void* scale;  // [tensors], like dot
  void* pull;   // [tensors], like dot
};

void launch_redundancy_pull(const RedundancyPullParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
