#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// Rows with this label count for nothing, as in torch.nn.functional.cross_entropy.
constexpr int64_t kIgnoredLabel = -100;

// At least a vector of any level.
constexpr int64_t kTermsPadding = 16;

// Some rows of one modality's logits [rows, classes].
struct LogitRows {
  DType dtype;
  const void* logits;
  const int64_t* labels;
  int64_t classes;
  int64_t begin;
  int64_t end;
};

// What the two means are taken over, one entry for each row; ignored rows are left alone.
struct RowScores {
  double* prob;
  double* log_prob;
};

// grad_logits = (grad_prob * p + grad_log_prob) * (onehot - softmax), row by row.
struct RowGrads {
  void* grad_logits;
  void* terms;  // scratch: float or double, classes + kTermsPadding of them
  double grad_prob;
  double grad_log_prob;
};

}  // namespace mmfuse::cpu
