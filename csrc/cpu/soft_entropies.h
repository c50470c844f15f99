#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// A soft histogram [bins, bins] of so many samples, float32 or float64.
struct SoftTable {
  DType dtype;
  const void* weights;
  int64_t bins;
  double samples;
};

constexpr int64_t kMaxSoftBins = 256;

// float32 or float64 values of one variable.
struct SoftValues {
  DType dtype;
  const void* values;
  const bool* present;  // null where all count
  int64_t begin;
  int64_t end;
};

// Both NaN as soon as one value is; low above high where none counts.
struct ValueEnds {
  double low;
  double high;
};

// How many values are at the lower and at the upper end.
struct EndCounts {
  int64_t low;
  int64_t high;
};

}  // namespace mmfuse::cpu
