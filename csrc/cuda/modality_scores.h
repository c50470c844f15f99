// modality_scores: batch means of the true class's softmax probability and its log, and their
// gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct ModalityLogits {
  const void* logits;  // [rows, classes]
  void* grad;          // likewise; only for the backward pass
  int32_t classes;
  DType dtype;
};

// Blocks that share the rows of one modality in the forward pass; a function of the batch alone, so
// that the order of every sum is too.
constexpr int kScoreRows = 128;

// float64 values that a block leaves in the workspace: sums of p, of log p, and of valid rows.
constexpr int kScoreSums = 3;

// A lane looks this far beyond the end of a row.
constexpr int64_t kMaxClasses = INT32_MAX - 512;

inline int64_t score_blocks(int64_t rows) {
  return rows > kScoreRows ? (rows + kScoreRows - 1) / kScoreRows : 1;
}

struct ModalityScoresParams {
  std::vector<ModalityLogits> modalities;
  const int64_t* labels;  // [rows]
  int64_t rows;
  double* workspace;  // [M, score_blocks(rows), kScoreSums]
  void* prob;         // [M]
  void* log_prob;     // [M]
  bool wide;          // prob and log_prob are float64
};

void launch_modality_scores(const ModalityScoresParams& params, cudaStream_t stream);

struct ModalityScoresBackwardParams {
  std::vector<ModalityLogits> modalities;
  const int64_t* labels;  // [rows]
  int64_t rows;
  Coefficients grad_prob;      // [M]
  Coefficients grad_log_prob;  // [M]
};

void launch_modality_scores_backward(const ModalityScoresBackwardParams& params,
                                     cudaStream_t stream);

}  // namespace mmfuse::cuda
