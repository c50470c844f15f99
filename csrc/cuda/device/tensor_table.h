// A list of tensors as one kernel parameter, so that no table is ever copied to the device, and the
// way from a chunk of work to its tensor.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
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
};

// A call without parameters or noise has small entries, so that more tensors share a launch.
template <bool kHasParams, bool kHasNoise>
struct Entry : AnchorFields<kHasParams>, NoiseFields<kHasNoise> {
  void* grad;
  int64_t numel;
  int32_t slot;
  uint32_t noise_id;  // without noise it is padding
};

// With noise, of a tensor in channels_last.
template <bool kHasParams>
struct TransposedEntry : Entry<kHasParams, true> {
  int32_t channels;
  int32_t spatial;
};

// Tensors of a short table, of 4 to 8 KB; two ResNet-18s have 120. Every launch copies its whole
// table, which for a long one is 32 KB.
constexpr int kShortList = 128;

// Entries of `entry_bytes` that a launch can carry beside `other_bytes`, each with its first chunk.
constexpr int longest_list(size_t entry_bytes, size_t other_bytes) {
  constexpr size_t kPadding = 24;
  return static_cast<int>((kMaxParamBytes - kPadding - other_bytes) /
                          (entry_bytes + sizeof(int32_t)));
}

template <typename entry_t, typename common_t, int kLength>
struct TensorTable {
  static constexpr int kCapacity = kLength;

  common_t common;  // what all tensors of the call share
  int32_t count;
  int32_t chunks;
  // Apart from the entries, so that the search for a chunk's tensor touches few lines of the cache.
  int32_t first_chunk[kCapacity];
  entry_t entries[kCapacity];
};

// A long table holds as many entries as fit.
template <typename entry_t, typename common_t, bool kShort>
using ListTable =
    TensorTable<entry_t, common_t,
                kShort ? kShortList : longest_list(sizeof(entry_t), sizeof(common_t))>;

template <bool kHasParams, bool kHasNoise, typename common_t, bool kShort>
using GradTable = ListTable<Entry<kHasParams, kHasNoise>, common_t, kShort>;

// The entry that `chunk` belongs to.
template <typename table_t>
__device__ __forceinline__ int find_entry(const table_t& table, int chunk) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// True if a kernel for these serves the tensor.
inline bool in_group(const GradTensor& tensor, DType dtype, Anchors anchors) {
  if (tensor.numel == 0 || tensor.grad_dtype != dtype) return false;
  return anchors == Anchors::kNone || anchors_of(tensor) == anchors;
}

// Calls f(std::true_type) where a short table holds the tensors of one group, else
// f(std::false_type). float64 and mixed dtypes are rare: a second kernel of each is not worth it.
template <typename scalar_t, Anchors kAnchors, typename F>
void visit_table_length(const std::vector<GradTensor>& tensors, DType dtype, const F& f) {
  if constexpr (!std::is_same_v<scalar_t, double> && kAnchors != Anchors::kMixed) {
    const auto count = std::count_if(tensors.begin(), tensors.end(), [&](const GradTensor& tensor) {
      return in_group(tensor, dtype, kAnchors);
    });
    if (count <= kShortList) return f(std::true_type{});
  }
  f(std::false_type{});
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
    if (!in_group(tensor, dtype, anchors)) continue;
    const int64_t chunks = chunks_of(tensor);
    if (chunks == 0) continue;
    if (table.count == table_t::kCapacity || table.chunks > kMaxChunks - chunks) flush();
    table.first_chunk[table.count] = table.chunks;
    auto& entry = table.entries[table.count++];
    entry.grad = tensor.grad;
    entry.numel = tensor.numel;
    entry.slot = tensor.slot;
    entry.noise_id = tensor.noise_id;
    if constexpr (kHasParams) {
      entry.param = tensor.param;
      entry.anchor = tensor.anchor;
      entry.param_dtype = tensor.param_dtype;
      entry.anchor_dtype = tensor.anchor_dtype;
    }
    if constexpr (kHasNoise) entry.noise_offset = tensor.noise_offset;
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
