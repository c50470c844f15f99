// The least and the largest value of a part of a row, by one block.
#pragma once

#include <cuda_runtime.h>

#include "histogram_bins.h"
#include "row_part.h"

namespace mmfuse::cuda {

template <bool kVector, int kThreads, typename scalar_t>
__device__ __forceinline__ Range<acc_type<scalar_t>> part_range(const scalar_t* part,
                                                                int elements) {
  Range<acc_type<scalar_t>> range;
#pragma unroll 2
  for (int tile = 0; tile < elements; tile += kRowPack * kThreads) {
    acc_type<scalar_t> x[kRowPack];
    const int count = tile_count<kVector, kThreads>(tile, elements);
    load_tile<kVector, kThreads>(part, tile, count, x);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j < count) include(range, x[j], x[j]);
    }
  }
  return block_range<kThreads>(range);
}

}  // namespace mmfuse::cuda
