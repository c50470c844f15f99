#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// The values [N] of one variable of one problem, and their place t = (x - low) * per_unit among
// the bins' centres; the two numbers are exact in the type that the values are computed in.
struct SoftAxis {
  const void* values;
  double low;
  double per_unit;
};

// Some samples of one problem.
struct SoftSamples {
  DType dtype;
  SoftAxis x;
  SoftAxis y;
  const bool* present;  // of the whole problem; null where all count
  int64_t bins;
  int64_t begin;
  int64_t end;
};

// grad is [bins, bins] of the type computed in; the data pointers are those of the whole problem.
struct SoftGrads {
  const void* grad;
  void* grad_x;
  void* grad_y;
};

// Sums of slope * (t - (bins - 1)) and of slope * t, for x and for y.
struct SoftRangeSums {
  double x_low = 0;
  double x_high = 0;
  double y_low = 0;
  double y_high = 0;
};

}  // namespace mmfuse::cpu
