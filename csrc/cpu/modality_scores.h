#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// Room for at least a vector of any level.
constexpr int64_t kTermsPadding = 16;

// Rows of one task at most, whose scores are on its stack.
constexpr int64_t kMaxTaskRows = 1024;

// Class indices; probabilities of the classes; a yes or no for each label.
enum class TargetKind { kIndices, kShares, kLabels };

// Element (outer, class, inner) of a tensor [outer, classes, inner]; a row is one (outer, inner).
struct RowStrides {
  int64_t outer;
  int64_t klass;
  int64_t inner;
};

// One number for each class, in both accumulators' types; null where none are given.
struct ClassWeights {
  const float* narrow = nullptr;  // kTermsPadding more can be read
  const double* wide = nullptr;

  const float* as(float) const { return narrow; }
  const double* as(double) const { return wide; }
};

// Some rows of one modality's logits, with their targets.
struct LogitRows {
  DType dtype;
  const void* logits;
  RowStrides strides;
  bool classes_adjoin;  // else the inner rows do
  TargetKind kind;
  const int64_t* labels;  // class indices, a number for each row
  DType target_dtype;
  const void* targets;  // the others
  RowStrides target_strides;
  ClassWeights weight;
  ClassWeights pos_weight;
  int64_t ignore_index;
  int64_t classes;
  int64_t inner;
  int64_t begin;
  int64_t end;
};

// True if rows whose classes adjoin take less time side by side, though each logit has to be moved
// for it.
inline bool better_as_columns(const LogitRows& rows) {
  constexpr int64_t kManyRows = 32;
  // Of float64 a row's own exponentials are taken one by one.
  const int64_t few = rows.dtype == DType::kFloat64 ? 96 : 32;
  return rows.kind == TargetKind::kIndices && rows.classes <= few &&
         rows.end - rows.begin >= kManyRows && rows.inner >= kManyRows;
}

// The results of each row from `begin` on: scores, 0 for one that does not count, and weight.
struct RowScores {
  double* prob;
  double* log_prob;
  double* weight;
};

// Further statistics of the same rows, against class indices: 0 for a row that does not count.
struct RowStatistics {
  RowScores scores;
  double* correct;  // 1 where the label is the first of the largest logits
  double* entropy;
  double* log_sum_exp;
  double* abs_sum;
};

// The slopes of both scores of each row are these times its weight.
struct RowGrads {
  void* grad_logits;
  RowStrides strides;
  void* terms;  // scratch: float or double, two rows of classes + kTermsPadding
  double grad_prob;
  double grad_log_prob;
};

}  // namespace mmfuse::cpu
