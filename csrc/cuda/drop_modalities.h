// drop_modalities: whole modalities of single samples are set to zero.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct DropTensor {
  const void* in;  // [rows, width]
  void* out;       // likewise
  int64_t width;
  int64_t noise_offset;
  uint32_t noise_id;
  DType dtype;
};

struct DropModalitiesParams {
  std::vector<DropTensor> tensors;
  int64_t rows;
  Coefficients scale;  // one value, or none for 1
  bool* keep;          // [M, rows]; drawn and written if noise_state is given, else read
  const float* q;      // [M]
  const int64_t* noise_state;
};

void launch_drop_modalities(const DropModalitiesParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
