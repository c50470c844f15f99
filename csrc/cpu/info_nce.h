#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// Columns that one task takes, and rows that it reads again and again: both fit in the cache.
constexpr int64_t kStripeColumns = 512;
constexpr int64_t kBlockRows = 16;

// The part [rows, columns] of a tile of float32 or float64 similarities.
struct SimilarityBlock {
  DType dtype;
  void* values;
  int64_t stride;
  int64_t rows;
  int64_t columns;
};

// sum = total of e^(x - max) over what has been seen.
struct RunningSums {
  double* max;
  double* sum;
};

// Slopes of the bound: scale * (diagonal - (e^(s - rows) + e^(s - columns)) / 2).
struct SlopeParams {
  const void* rows;
  const void* columns;
  int64_t diagonal;  // the column of the first row's own partner, inside the block or not
  double scale;
};

}  // namespace mmfuse::cpu
