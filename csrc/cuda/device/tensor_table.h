// A list of tensors as one kernel parameter, so that no table is ever copied to the device, and the
// way from a chunk of work to its tensor.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "element.h"
#include "launch.h"
#include "params.h"

namespace mmfuse::cuda {

// kNone: neither parameters nor anchors. kSame: both have the gradient's dtype, known when
// compiling. kZero: the parameters have it, and no anchors are given. kMixed: any dtypes, with
// anchors or without.
enum class Anchors { kNone, kSame, kMixed, kZero };

template <Anchors kAnchors>
using AnchorsTag = std::integral_constant<Anchors, kAnchors>;

inline Anchors anchors_of(const GradTensor& tensor) {
  if (tensor.param_dtype != tensor.grad_dtype) return Anchors::kMixed;
  if (tensor.anchor == nullptr) return Anchors::kZero;
  return tensor.anchor_dtype == tensor.grad_dtype ? Anchors::kSame : Anchors::kMixed;
}

constexpr int kThreads = 256;

template <bool kPresent>
struct AnchorFields {};

template <>
struct AnchorFields<true> {
  const void* param;
  const void* anchor;
  DType param_dtype;
  DType anchor_dtype;
};

template <bool kPresent>
struct NoiseFields {};

template <>
struct NoiseFields<true> {
  int64_t noise_offset;
  uint32_t noise_id;
};

// A call without parameters or noise has small entries, so that more tensors share a launch.
template <bool kHasParams, bool kHasNoise>
struct Entry : AnchorFields<kHasParams>, NoiseFields<kHasNoise> {
  void* grad;
  int64_t numel;
  int32_t slot;
  int32_t first_chunk;
};

// With noise, of a tensor in channels_last.
template <bool kHasParams>
struct TransposedEntry : Entry<kHasParams, true> {
  int32_t channels;
  int32_t spatial;
};

template <typename entry_t, typename common_t>
struct TensorTable {
  static constexpr int kCapacity = (kMaxParamBytes - static_cast<int>(sizeof(common_t)) - 16) /
                                   static_cast<int>(sizeof(entry_t));

  common_t common;  // what all tensors of the call share
  int32_t count;
  int32_t chunks;
  entry_t entries[kCapacity];
};

// The entry that `chunk` belongs to.
template <typename table_t>
__device__ __forceinline__ int find_entry(const table_t& table, int chunk) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Fills the table with the tensors of one group and calls start() each time that it is full. Of a
// tensor come chunks_of(tensor) chunks, or it is left out where they are none.
template <bool kHasParams, bool kHasNoise, typename table_t, typename chunks_t, typename F>
void for_each_table_of(const std::vector<GradTensor>& tensors, DType dtype, Anchors anchors,
                       const chunks_t& chunks_of, table_t& table, const F& start) {
  constexpr int64_t kMaxChunks = 1 << 30;  // a stride beyond the last chunk is still an int
  table.count = 0;
  table.chunks = 0;
  const auto flush = [&] {
    if (table.count > 0) start();
    table.count = 0;
    table.chunks = 0;
  };
  for (const GradTensor& tensor : tensors) {
    if (tensor.numel == 0 || tensor.grad_dtype != dtype) continue;
    if (kHasParams && anchors_of(tensor) != anchors) continue;
    const int64_t chunks = chunks_of(tensor);
    if (chunks == 0) continue;
    if (table.count == table_t::kCapacity || table.chunks > kMaxChunks - chunks) flush();
    auto& entry = table.entries[table.count++];
    entry.grad = tensor.grad;
    entry.numel = tensor.numel;
    entry.slot = tensor.slot;
    entry.first_chunk = table.chunks;
    if constexpr (kHasParams) {
      entry.param = tensor.param;
      entry.anchor = tensor.anchor;
      entry.param_dtype = tensor.param_dtype;
      entry.anchor_dtype = tensor.anchor_dtype;
    }
    if constexpr (kHasNoise) {
      entry.noise_offset = tensor.noise_offset;
      entry.noise_id = tensor.noise_id;
    }
    if constexpr (std::is_same_v<decltype(entry), TransposedEntry<kHasParams>&>) {
      entry.channels = tensor.channels;
      entry.spatial = tensor.spatial;
    }
    table.chunks += static_cast<int32_t>(chunks);
  }
  flush();
}

// The same, in chunks of so many elements.
template <bool kHasParams, bool kHasNoise, typename table_t, typename F>
void for_each_table(const std::vector<GradTensor>& tensors, DType dtype, Anchors anchors,
                    int64_t chunk_elements, table_t& table, const F& start) {
  const auto chunks_of = [&](const GradTensor& tensor) {
    return chunk_count(tensor.numel, chunk_elements);
  };
  for_each_table_of<kHasParams, kHasNoise>(tensors, dtype, anchors, chunks_of, table, start);
}

// Calls f(element type, Anchors) once for each group of tensors that one kernel serves.
template <typename F>
void visit_groups(const std::vector<GradTensor>& tensors, bool has_params, const F& f) {
  bool present[4][4] = {};
  for (const GradTensor& tensor : tensors) {
    if (tensor.numel == 0) continue;
    const Anchors anchors = has_params ? anchors_of(tensor) : Anchors::kNone;
    present[static_cast<int>(tensor.grad_dtype)][static_cast<int>(anchors)] = true;
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    const auto [none, same, mixed, zero] = present[static_cast<int>(dtype)];
    visit_dtype(dtype, [&, none = none, same = same, mixed = mixed, zero = zero](auto* type) {
      if (none) f(type, AnchorsTag<Anchors::kNone>{});
      if (same) f(type, AnchorsTag<Anchors::kSame>{});
      if (zero) f(type, AnchorsTag<Anchors::kZero>{});
      if (mixed) f(type, AnchorsTag<Anchors::kMixed>{});
    });
  }
}

}  // namespace mmfuse::cuda
