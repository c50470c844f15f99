// grad_stats: mean, centred second moment and displacement products of a list of gradients.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"
#include "cuda/modulation_factors.h"

namespace mmfuse::cuda {

// Elements that one block reduces to one row of the workspace; the partition of a tensor depends on
// nothing but its size, so that the result does not either.
constexpr int kStatsChunk = 16384;

// float64 values in a row of the workspace: shift, mean - shift, m2, dot, disp_sq.
constexpr int kStatsRow = 5;

struct GradStatsParams {
  std::vector<GradTensor> tensors;
  bool has_params;
  double* workspace;  // [stats_rows(tensors), kStatsRow]
  int64_t* numel;     // [T]
  void* moments;      // [2, T], or [4, T] with parameters
  bool wide;          // moments are float64
  // Is made in the place of `numel` and `moments`, if there is one; it reads neither.
  const ModulationFactorsParams* decision = nullptr;
};

inline int64_t stats_rows(const std::vector<GradTensor>& tensors) {
  int64_t rows = 0;
  for (const GradTensor& tensor : tensors) rows += chunk_count(tensor.numel, kStatsChunk);
  return rows;
}

void launch_grad_stats(const GradStatsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
