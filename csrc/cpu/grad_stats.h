#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

// A stretch of one tensor; `param` and `anchor` start where `grad` does, or are null: both, or the
// anchor alone, which then counts as zeros.
struct StatsSlice {
  DType grad_dtype;
  DType param_dtype;
  DType anchor_dtype;
  const void* grad;
  const void* param;
  const void* anchor;
  int64_t begin;
  int64_t size;
};

}  // namespace mmfuse::cpu
