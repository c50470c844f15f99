// Shared by the histograms: a block reads its part of a row four elements a thread, and keeps what
// it has counted in dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "element.h"
#include "launch.h"

namespace mmfuse::cuda {

constexpr int kRowPack = 4;

// No part is longer, so that an int holds every position a block looks at.
constexpr int64_t kMaxPart = 1 << 30;

template <typename value_t>
__device__ __forceinline__ value_t* dynamic_shared() {
#ifdef MMFUSE_CUDA_ON_CPU
  return static_cast<value_t*>(cuda_on_cpu::dynamic_shared());
#else
  extern __shared__ double dynamic_shared_memory[];
  return reinterpret_cast<value_t*>(dynamic_shared_memory);
#endif
}

// The part of row `problem` that a block works on.
struct RowPart {
  int64_t problem;
  int64_t part;
  int64_t begin;  // in the flattened [P, N]
  int elements;
};

__device__ __forceinline__ RowPart row_part(int64_t block, int64_t parts, int64_t chunk,
                                            int64_t columns) {
  const int64_t problem = block / parts;
  const int64_t part = block - problem * parts;
  const int64_t first = part * chunk;
  const int64_t left = columns - first;
  return {problem, part, problem * columns + first, static_cast<int>(left < chunk ? left : chunk)};
}

// The index of this thread's j-th element of the tile that starts at `tile`: they lie next to each
// other if the rows are aligned for vectors, otherwise a block apart.
template <bool kVector, int kThreads>
__device__ __forceinline__ int tile_index(int tile, int j) {
  const int thread = threadIdx.x;
  return kVector ? tile + thread * kRowPack + j : tile + thread + j * kThreads;
}

// How many of these there are.
template <bool kVector, int kThreads>
__device__ __forceinline__ int tile_count(int tile, int elements) {
  const int left = elements - tile_index<kVector, kThreads>(tile, 0);
  const int count = kVector ? left : (left + kThreads - 1) / kThreads;
  return left <= 0 ? 0 : count < kRowPack ? count : kRowPack;
}

template <bool kVector, int kThreads, typename scalar_t>
__device__ __forceinline__ void load_tile(const scalar_t* part, int tile, int count,
                                          acc_type<scalar_t> (&values)[kRowPack]) {
  Pack<scalar_t, kRowPack> pack = {};
  if (kVector && count == kRowPack) {
    pack = load_pack<true, kRowPack>(part + tile_index<kVector, kThreads>(tile, 0));
  } else {
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j < count) pack.v[j] = part[tile_index<kVector, kThreads>(tile, j)];
    }
  }
#pragma unroll
  for (int j = 0; j < kRowPack; ++j) values[j] = widen<acc_type<scalar_t>>(pack.v[j]);
}

template <bool kVector, int kThreads, typename scalar_t>
__device__ __forceinline__ void store_tile(scalar_t* part, int tile, int count,
                                           const acc_type<scalar_t> (&values)[kRowPack]) {
  Pack<scalar_t, kRowPack> pack;
#pragma unroll
  for (int j = 0; j < kRowPack; ++j) pack.v[j] = round_to<scalar_t>(values[j]);
  if (kVector && count == kRowPack) {
    store_pack<true>(part + tile_index<kVector, kThreads>(tile, 0), pack);
  } else {
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j < count) part[tile_index<kVector, kThreads>(tile, j)] = pack.v[j];
    }
  }
}

// True if every part of every row of [problems, columns] can be loaded as vectors.
inline bool rows_aligned(int64_t problems, int64_t columns) {
  return problems == 1 || columns % (kVectorBytes / 2) == 0;
}

}  // namespace mmfuse::cuda
