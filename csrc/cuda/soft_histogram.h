// soft_histogram: a joint histogram in which samples are shared out between neighbouring bins.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct SoftRows {
  const void* x;        // [problems, columns]
  const void* y;        // likewise
  const void* x_range;  // [problems, 2], float64 if x is, else float32
  const void* y_range;  // likewise
  const bool* present;  // [problems, columns], of float32 and float64; null where all count
  int64_t problems;
  int64_t columns;
  int bins;
  DType dtype;
};

// Samples of a problem that one block shares out, a function of shape and dtype alone. Sums of
// shares of no more samples fit the words that they are kept in.
inline int64_t soft_chunk(const SoftRows& rows) {
  const int64_t most = rows.dtype == DType::kFloat64 ? 16384 : 32768;
  if (rows.problems >= 128 || rows.columns > (int64_t{1} << 22)) return most;
  return std::min(most, std::max<int64_t>(4096, int64_t{2} * rows.bins * rows.bins / 8 * 8));
}

// 8-byte words of a cell in what the blocks add up: a float64 share has more bits than one holds.
inline int64_t soft_sum_words(DType dtype) { return dtype == DType::kFloat64 ? 2 : 1; }

// True if one block makes a whole histogram.
bool block_per_problem(const SoftRows& rows);

struct SoftHistogramParams {
  SoftRows rows;
  void* sums;     // [problems, soft_sum_words * bins² + 1] zeros, unless block_per_problem
  void* weights;  // [problems, bins, bins], float64 if x is, else float32
};

void launch_soft_histogram(const SoftHistogramParams& params, cudaStream_t stream);

struct SoftHistogramBackwardParams {
  SoftRows rows;
  const void* grad;  // like weights
  void* grad_x;
  void* grad_y;
  void* grad_x_range;
  void* grad_y_range;
  double* partials;  // [problems, chunk_count(columns, soft_chunk(...)), 4]
};

void launch_soft_histogram_backward(const SoftHistogramBackwardParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
