// info_nce: log-sum-exp of the rows and columns of a matrix that is only ever seen in tiles.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Elements of a tile: 128 blocks of 128 x 256 for the product, where a large GPU has 132
// multiprocessors, and 16 MiB, which stay in its L2 cache.
constexpr int64_t kTileElements = int64_t{1} << 22;

// Part of a [batch, batch] matrix of float32 or float64 inner products; similarities are these,
// divided by the temperature.
struct Tile {
  void* values;  // [rows, columns]
  int64_t rows;
  int64_t columns;
  int64_t row;  // of the first element in the whole
  int64_t column;
  bool wide;  // float64
  Coefficients temperature;
};

// For every row and column of the whole: the largest so far, the sum of e^(x - max), and the
// diagonal; all of the similarities' type.
struct LogSumExpState {
  void* row_max;
  void* row_sum;
  void* column_max;
  void* column_sum;
  void* diagonal;
};

// Adds a tile; the first tiles of a row and of a column start their sums.
void launch_add_tile(const Tile& tile, const LogSumExpState& state, cudaStream_t stream);

// Rows that one block of the kernel below adds up.
constexpr int kFinishRows = 256;

struct InfoNceParams {
  LogSumExpState state;
  int64_t batch;
  bool wide;
  double* partials;  // [chunk_count(batch, kFinishRows)]
  void* rows;        // [batch]
  void* columns;
  void* bound;
};

void launch_info_nce(const InfoNceParams& params, cudaStream_t stream);

// Blocks that turn a tile of this shape into slopes.
constexpr int kSlopeRows = 8;
constexpr int kSlopeColumns = 1024;
inline int64_t slope_blocks(int64_t rows, int64_t columns) {
  return chunk_count(rows, kSlopeRows) * chunk_count(columns, kSlopeColumns);
}

struct SlopeParams {
  Tile tile;
  const void* rows;  // log-sum-exp of the whole's rows and columns
  const void* columns;
  Coefficients grad;
  int64_t batch;
  double* partials;  // the block's sum of slope * similarity / scale is added to its entry
  void* halves;      // [2, rows, columns] of half_dtype, or null: see below
  DType half_dtype;
};

// slope = scale * (diagonal - (e^(s - row) + e^(s - column)) / 2). With scale = grad / batch, in
// place; or for products in half precision with half_scale, as the sum of two halves, of
// which the second is what rounding left of the first.
void launch_slope(const SlopeParams& params, cudaStream_t stream);

// Slopes are at most 1. In float16 small ones would lose bits below 2^-14, large ones end at 2^16.
MMFUSE_HD constexpr float half_scale(DType dtype) {
  return dtype == DType::kFloat16 ? 32768.0f : 1.0f;
}

// sums += product * grad / (batch * half_scale), float32.
struct AddProductParams {
  float* sums;
  const float* product;
  int64_t count;
  Coefficients grad;
  int64_t batch;
  DType half_dtype;
};

void launch_add_product(const AddProductParams& params, cudaStream_t stream);

struct GradTemperatureParams {
  const double* partials;
  int64_t count;
  Coefficients grad;
  Coefficients temperature;
  int64_t batch;
  void* grad_temperature;
};

void launch_grad_temperature(const GradTemperatureParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
