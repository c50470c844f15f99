// modality_scores: how sure each modality is of the targets, of each row or on average, and the
// averages' gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Class indices; probabilities of the classes; a yes or no for each label.
enum class TargetKind : int32_t { kIndices, kShares, kLabels };

// Element (outer, class, inner) of a tensor [outer, classes, inner]; a row is one (outer, inner).
struct RowStrides {
  int64_t outer;
  int64_t klass;
  int64_t inner;
};

struct ModalityLogits {
  const void* logits;
  void* grad;  // only for the backward pass
  RowStrides strides;
  RowStrides grad_strides;
  int32_t classes;
  DType dtype;
  bool classes_adjoin;  // else the inner rows do
};

// The targets of all modalities.
struct ScoreTargets {
  TargetKind kind;
  DType dtype;
  const void* values;  // int64, a number for each row, or floating
  RowStrides strides;
  const double* weight;      // of each class, or null
  const double* pos_weight;  // likewise
  int64_t ignore_index;
  int64_t rows;
  int64_t inner;
};

// Blocks that share the rows of one modality in the forward pass; a function of the batch alone, so
// that the order of every sum is too.
constexpr int kScoreRows = 128;

// float64 values that a block leaves in the workspace: sums of w p, of w log p, and of w.
constexpr int kScoreSums = 3;

// A lane looks this far beyond the end of a row.
constexpr int64_t kMaxClasses = INT32_MAX - 512;

inline int64_t score_blocks(int64_t rows) {
  return rows > kScoreRows ? (rows + kScoreRows - 1) / kScoreRows : 1;
}

struct ModalityScoresParams {
  std::vector<ModalityLogits> modalities;
  ScoreTargets targets;
  int widest;         // the modality whose weights are returned
  double* workspace;  // [M, score_blocks(rows), kScoreSums]
  void* prob;         // [M]
  void* log_prob;     // [M]
  double* count;
  bool wide;  // prob and log_prob are float64
};

void launch_modality_scores(const ModalityScoresParams& params, cudaStream_t stream);

// Of class indices; the share of rows that are right in the place of prob, prob in that of
// log_prob.
void launch_modality_accuracies(const ModalityScoresParams& params, cudaStream_t stream);

struct SampleScoresParams {
  std::vector<ModalityLogits> modalities;
  ScoreTargets targets;
  int widest;
  void* prob;       // [M, rows]
  void* log_prob;   // [M, rows]
  double* weights;  // [rows]
  bool wide;
};

void launch_sample_scores(const SampleScoresParams& params, cudaStream_t stream);

struct SampleStatisticsParams {
  SampleScoresParams scores;
  bool* correct;  // [M, rows], as the others
  void* entropy;  // float64 if the scores are
  void* log_sum_exp;
  void* abs_sum;
};

// Statistics for class indices.
void launch_sample_statistics(const SampleStatisticsParams& params, cudaStream_t stream);

struct ModalityScoresBackwardParams {
  std::vector<ModalityLogits> modalities;
  ScoreTargets targets;
  const double* count;
  Coefficients grad_prob;      // [M]
  Coefficients grad_log_prob;  // [M]
};

void launch_modality_scores_backward(const ModalityScoresBackwardParams& params,
                                     cudaStream_t stream);

}  // namespace mmfuse::cuda
