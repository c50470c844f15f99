// logit_divergence: how far pairs of logits are apart, row by row or on average, and the gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// The kinds in the order of mmfuse/reference/logit_divergence.py.
enum class DivergenceKind : int32_t { kKl, kMixture, kJs };

// The numbers of each row: both maxima, both logarithms of the sums of exponentials, and the means
// under p and under q that its gradients take.
constexpr int kRowNumbers = 6;

// Both [rows, classes]; the classes adjoin in memory. Gradients are contiguous, or null.
struct LogitPair {
  const void* first;
  const void* second;
  void* grad_first;
  void* grad_second;
  int64_t first_stride;
  int64_t second_stride;
  int32_t classes;
  DType dtype;
};

// A lane looks this far beyond the end of a row.
constexpr int64_t kMaxPairClasses = INT32_MAX - 512;

// Rows of one block; a function of nothing, so that the order of every sum is one of the batch.
constexpr int kDivergenceRows = 128;

inline int64_t divergence_blocks(int64_t rows) {
  return rows > kDivergenceRows ? (rows + kDivergenceRows - 1) / kDivergenceRows : 1;
}

struct LogitDivergenceParams {
  std::vector<LogitPair> pairs;
  DivergenceKind kind;
  int64_t rows;
  bool per_row;
  double* workspace;  // [K, divergence_blocks(rows)], unless per_row
  void* value;        // [K], or [K, rows]
  void* numbers;      // [K, kRowNumbers, rows]
  bool wide;          // both are float64
};

void launch_logit_divergence(const LogitDivergenceParams& params, cudaStream_t stream);

struct LogitDivergenceBackwardParams {
  std::vector<LogitPair> pairs;
  DivergenceKind kind;
  int64_t rows;
  bool per_row;
  Coefficients grad;     // [K], or [K, rows]
  Coefficients numbers;  // [K, kRowNumbers, rows]
};

void launch_logit_divergence_backward(const LogitDivergenceBackwardParams& params,
                                      cudaStream_t stream);

}  // namespace mmfuse::cuda
