// soft_entropies: the ranges of the values before a soft histogram, and the entropies after it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

// Two variables, float32 or float64, and the ranges [problems, 2] of their rows.
struct SoftPairs {
  const void* values[2];  // [problems, columns]
  void* ranges[2];
  const bool* present;  // [problems, columns]; null where all count
  int64_t problems;
  int64_t columns;
  bool wide;  // float64
};

// Values of a row that one block looks at.
constexpr int64_t kEndsChunk = 32768;

struct SoftRangeParams {
  SoftPairs pairs;
  void* partials;  // [2, problems, chunk_count(columns, kEndsChunk), 2], like the values
};

void launch_soft_ranges(const SoftRangeParams& params, cudaStream_t stream);

// Adds to counts [problems], of zeros, how many samples are present.
void launch_soft_counts(const SoftPairs& pairs, unsigned long long* counts, cudaStream_t stream);

struct SoftTables {
  const void* weights;               // [problems, bins, bins], like the values
  const unsigned long long* counts;  // [problems] samples that count; null where all do
  int64_t problems;
  int64_t samples;
  int bins;
  bool wide;
};

// entropies: [problems, 3] of x, y and both.
void launch_soft_entropies(const SoftTables& tables, void* entropies, cudaStream_t stream);

// slopes: like the weights, from grad [problems, 3].
void launch_soft_slopes(const SoftTables& tables, const void* grad, void* slopes,
                        cudaStream_t stream);

struct SoftEndsParams {
  SoftPairs pairs;
  const void* of_ranges[2];    // gradients of the ranges
  void* grads[2];              // of the values; what the ends get is added
  unsigned long long* counts;  // [2, problems, 2] zeros: how many values are at either end
};

void launch_soft_ends(const SoftEndsParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
