// The arguments that the glue hands to the launchers, for glue that knows no device code.
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
  // The rows' order with noise, as RowOrder has it; 1 and 1 where elements lie as they are counted.
  int32_t channels = 1;
  int32_t spatial = 1;
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

// Elements of a tile of a tensor in channels_last, whose deviates take 16 KB of shared memory.
constexpr int kTransposedTile = 4096;

// How such a tensor's rows are cut: each tile has so many of them, or part of one.
struct TransposedTiling {
  int rows;
  int channels;
  int spatial;

  MMFUSE_HD int channel_tiles(int of) const { return (of + channels - 1) / channels; }
  MMFUSE_HD int spatial_tiles(int of) const { return (of + spatial - 1) / spatial; }
};

MMFUSE_HD TransposedTiling transposed_tiling(int channels, int spatial) {
  constexpr int kFewChannels = 32;  // adjoin in memory for a whole warp
  const int row = channels * spatial;
  if (row <= kTransposedTile) return {kTransposedTile / row, channels, spatial};
  if (kFewChannels * spatial <= kTransposedTile) {
    return {1, kTransposedTile / spatial / kNoiseBlock * kNoiseBlock, spatial};
  }
  const int few = channels < kFewChannels ? channels : kFewChannels;
  const int fit = kTransposedTile / few;
  return {1, few, fit < spatial ? fit : spatial};
}

MMFUSE_HD int64_t transposed_tiles(const GradTensor& tensor) {
  const TransposedTiling tiling = transposed_tiling(tensor.channels, tensor.spatial);
  const int64_t rows = tensor.numel / (static_cast<int64_t>(tensor.channels) * tensor.spatial);
  return (rows + tiling.rows - 1) / tiling.rows * tiling.channel_tiles(tensor.channels) *
         tiling.spatial_tiles(tensor.spatial);
}

}  // namespace mmfuse::cuda
