#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// The kinds in the order of mmfuse/reference/logit_divergence.py.
enum class DivergenceKind { kKl, kMixture, kJs };

// The numbers of each row: both maxima, both logarithms of the sums of exponentials, and the means
// under p and under q that its gradients take.
constexpr int kRowNumbers = 6;

// More than a vector of any level.
constexpr int64_t kTermsPadding = 16;

// A row of both logits; the classes adjoin in memory.
struct LogitPair {
  DType dtype;
  const void* first;
  const void* second;
  int64_t first_stride;
  int64_t second_stride;
  int64_t classes;
};

struct RowDivergence {
  double value;
  double numbers[kRowNumbers];
};

// Null where no gradient is wanted; rows adjoin.
struct PairGrads {
  void* first;
  void* second;
};

}  // namespace mmfuse::cpu
