// What the glue hands to the launchers, for glue that knows no device code.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"

namespace mmfuse::cuda {

// One tensor of a list call, as the glue hands it over.
struct GradTensor {
  void* grad = nullptr;
  const void* param = nullptr;
  const void* anchor = nullptr;  // null where the tensor has parameters: zeros, read nowhere
  int64_t numel = 0;
  int64_t noise_offset = 0;
  uint32_t noise_id = 0;
  int32_t slot = 0;  // position in the call, where its coefficients and results are
  DType grad_dtype = DType::kFloat32;
  DType param_dtype = DType::kFloat32;
  DType anchor_dtype = DType::kFloat32;
};

// float32 or float64 factors on the device; a null pointer stands for a term that is left out.
struct Coefficients {
  const void* values = nullptr;
  bool wide = false;  // float64
};

// Elements of an update's chunk: few enough that the last blocks of a launch do not work alone for
// long.
constexpr int kUpdateChunk = 8192;

MMFUSE_HD int64_t chunk_count(int64_t numel, int64_t chunk_elements) {
  return (numel + chunk_elements - 1) / chunk_elements;
}

}  // namespace mmfuse::cuda
