// joint_entropies: exact joint histograms of pairs or triples, and the entropies of their margins.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/device/params.h"

namespace mmfuse::cuda {

constexpr int kMaxOrder = 3;

// Values whose range one block finds, if many share a row.
inline int64_t range_chunk(int64_t columns) {
  constexpr int64_t kMostParts = 256;
  return std::max<int64_t>(16384, (chunk_count(columns, kMostParts) + 7) / 8 * 8);
}

struct JointEntropiesParams {
  std::vector<const void*> data;  // K variables [problems, columns]
  std::vector<int64_t> tuples;    // [Q * order]
  int order;
  int bins;
  int64_t problems;
  int64_t columns;
  DType dtype;
  double* ranges;     // [K, problems, chunk_count(columns, range_chunk(columns)), 2]
  bool ranges_found;  // by the launch before, of the same data
  double* entropies;  // [Q, problems, 2^order - 1]
  int64_t* counts;    // [Q, problems, bins^order]
};

// True if one block counts a whole problem. If not, counts must be zero at first, and ranges are
// needed.
bool block_per_problem(const JointEntropiesParams& params);

void launch_joint_entropies(const JointEntropiesParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
