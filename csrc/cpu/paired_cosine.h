#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace mmfuse::cpu {

// Some rows of two features [rows, width]; the data pointers are those of the whole tensors.
struct FeatureRows {
  DType dtype;
  const void* a;
  const void* b;
  int64_t width;
  int64_t begin;
  int64_t end;
};

// The places of both gradients, and the gradient of one row's cosine.
struct CosineGrads {
  void* grad_a;
  void* grad_b;
  double grad;
};

// The mean over all pairs of features and over the rows; each feature is [rows, width].
double mean_cosine(DType dtype, const std::vector<const void*>& features, int64_t rows,
                   int64_t width);

}  // namespace mmfuse::cpu
