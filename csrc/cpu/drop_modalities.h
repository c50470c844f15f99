#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"

namespace mmfuse::cpu {

// True if the samples of one modality are kept.
struct KeepSlice {
  NoiseKey noise_key;
  int64_t noise_offset;
  float q;
  bool* keep;
  int64_t begin;
  int64_t end;
};

// A stretch of a modality's elements; the data pointers are those of the whole tensors, and row i
// has `width` elements.
struct DropSlice {
  DType dtype;
  const void* in;
  void* out;
  const bool* keep;
  int64_t width;
  double scale;
  int64_t begin;
  int64_t size;
};

}  // namespace mmfuse::cpu
