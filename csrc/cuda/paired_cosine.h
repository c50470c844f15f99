// paired_cosine: the mean cosine of row pairs, its gradient, and the sums that the gate needs too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

struct CosinePair {
  const void* a;  // [rows, columns]
  const void* b;  // likewise
};

struct CosineSumsParams {
  std::vector<CosinePair> pairs;
  int64_t rows;
  int64_t columns;
  DType dtype;
  double* partials;  // [pairs, cosine_blocks(rows, columns)]
};

// A whole block shares a long row where there are too few rows for all warps to have their own.
inline bool block_per_row(int64_t rows, int64_t columns) {
  return columns > 65536 || (columns > 1024 && rows <= 2048);
}

// Rows whose cosines one block adds up; like all of the partition a function of the shape alone.
inline int64_t cosine_rows(int64_t rows, int64_t columns) {
  return (rows > 65536 ? 8 : 1) * (block_per_row(rows, columns) ? 1 : 8);
}

inline int64_t cosine_blocks(int64_t rows, int64_t columns) {
  return chunk_count(rows, cosine_rows(rows, columns));
}

// Leaves the blocks' sums of cosines in the workspace.
void launch_cosine_sums(const CosineSumsParams& params, cudaStream_t stream);

struct PairedCosineParams {
  CosineSumsParams sums;
  void* cosine;  // float64 if the features are, else float32
};

void launch_paired_cosine(const PairedCosineParams& params, cudaStream_t stream);

struct PairedCosineBackwardParams {
  CosinePair pair;
  void* grad_a;
  void* grad_b;
  int64_t rows;
  int64_t columns;
  DType dtype;
  Coefficients grad;
};

void launch_paired_cosine_backward(const PairedCosineBackwardParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
