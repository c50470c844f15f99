// Shared by grad_stats and the updates: a thread's packs of one tensor, loaded as a batch, so that
// several independent loads are in flight before the first is used.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "element.h"
#include "tensor_table.h"

namespace mmfuse::cuda {

// Elements that a thread handles as one: whole Philox blocks of four, and 16 bytes where the other
// tensors' elements are known not to be wider.
template <typename scalar_t, Anchors kAnchors>
constexpr int kPackSize =
    kAnchors == Anchors::kMixed || sizeof(scalar_t) * kNoiseBlock > kVectorBytes
        ? kNoiseBlock
        : static_cast<int>(kVectorBytes / sizeof(scalar_t));

// Packs in a batch whose widened gradients take this many registers. A kernel's other
// registers limit these, if enough blocks are to fit on a multiprocessor without spilling.
template <typename scalar_t, Anchors kAnchors, int kRegisters>
constexpr int kBatchPacks =
    kAnchors == Anchors::kMixed
        ? 1
        : kRegisters * 4 /
              (kPackSize<scalar_t, kAnchors> * static_cast<int>(sizeof(acc_type<scalar_t>)));

// Pack u of the batch starts at source[u * stride]; from `valid` on they count as zeros.
template <bool kVector, typename source_t, typename acc_t, int kPacks, int kPack>
__device__ __forceinline__ void load_batch(const source_t* source, int stride, int valid,
                                           acc_t (&values)[kPacks][kPack]) {
  Pack<source_t, kPack> packs[kPacks] = {};
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
    if (u < valid) packs[u] = load_pack<kVector, kPack>(source + u * stride);
  }
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[u][j] = widen<acc_t>(packs[u].v[j]);
  }
}

// The parameter w and its anchor w0, of any dtype; a null anchor counts as zeros.
struct AnchorPair {
  const void* param;
  const void* anchor;
  DType param_dtype;
  DType anchor_dtype;
};

// Calls f with the pointer in its own type: the gradient's, or one found at run time.
template <Anchors kAnchors, typename scalar_t, typename F>
__device__ __forceinline__ void visit_source(const void* source, DType dtype, const F& f) {
  if constexpr (kAnchors != Anchors::kMixed) {
    f(static_cast<const scalar_t*>(source));
  } else {
    visit_dtype(dtype, [&](auto* type) {
      f(static_cast<const std::remove_pointer_t<decltype(type)>*>(source));
    });
  }
}

// Does as visit_source, for the anchor; does nothing where there is none.
template <Anchors kAnchors, typename scalar_t, typename F>
__device__ __forceinline__ void visit_anchor(const AnchorPair& pair, const F& f) {
  if constexpr (kAnchors == Anchors::kSame) {
    f(static_cast<const scalar_t*>(pair.anchor));
  } else if constexpr (kAnchors == Anchors::kMixed) {
    if (pair.anchor != nullptr) visit_source<kAnchors, scalar_t>(pair.anchor, pair.anchor_dtype, f);
  }
}

// w - w0 of a batch whose first pack starts at element `first`.
template <Anchors kAnchors, typename scalar_t, bool kVector, typename acc_t, int kPacks, int kPack>
__device__ __forceinline__ void load_displacements(const AnchorPair& pair, int64_t first,
                                                   int stride, int valid,
                                                   acc_t (&displacement)[kPacks][kPack]) {
  acc_t anchor[kPacks][kPack] = {};
  visit_source<kAnchors, scalar_t>(pair.param, pair.param_dtype, [&](const auto* source) {
    load_batch<kVector>(source + first, stride, valid, displacement);
  });
  visit_anchor<kAnchors, scalar_t>(pair, [&](const auto* source) {
    load_batch<kVector>(source + first, stride, valid, anchor);
  });
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) displacement[u][j] -= anchor[u][j];
  }
}

template <Anchors kAnchors, typename scalar_t>
__device__ __forceinline__ acc_type<scalar_t> load_displacement(const AnchorPair& pair,
                                                                int64_t index) {
  using acc_t = acc_type<scalar_t>;
  acc_t param, anchor = 0;
  visit_source<kAnchors, scalar_t>(pair.param, pair.param_dtype, [&](const auto* source) {
    param = widen<acc_t>(source[index]);
  });
  visit_anchor<kAnchors, scalar_t>(
      pair, [&](const auto* source) { anchor = widen<acc_t>(source[index]); });
  return param - anchor;
}

// True if the packs of w and w0 that start at element `first` can be loaded as vectors.
template <Anchors kAnchors, typename scalar_t>
__device__ __forceinline__ bool is_aligned(const AnchorPair& pair, int64_t first) {
  bool aligned = true;
  const auto look = [&](const auto* source) { aligned = aligned && is_aligned(source + first); };
  visit_source<kAnchors, scalar_t>(pair.param, pair.param_dtype, look);
  visit_anchor<kAnchors, scalar_t>(pair, look);
  return aligned;
}

template <Anchors kAnchors, typename entry_t>
__device__ __forceinline__ AnchorPair anchor_pair(const entry_t& entry) {
  if constexpr (kAnchors == Anchors::kNone) {
    return {};
  } else if constexpr (kAnchors == Anchors::kZero) {
    return {entry.param, nullptr, entry.param_dtype, entry.param_dtype};
  } else {
    return {entry.param, entry.anchor, entry.param_dtype, entry.anchor_dtype};
  }
}

}  // namespace mmfuse::cuda
