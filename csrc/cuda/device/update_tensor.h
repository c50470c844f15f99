// scale*g + pull*(w - w0) + noise_std*N(0, 1) on a chunk of one tensor, for a whole block.
//
// A tensor is cut into packs that start at a Philox block, if there is noise, and at 16-byte
// addresses, if the tensors' addresses allow both. The few elements before the first and after the
// last pack are done one by one.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "common/philox.h"
#include "element.h"
#include "noise_key.h"
#include "pack_batch.h"
#include "tensor_table.h"

namespace mmfuse::cuda {

// The same for all elements of a tensor.
template <typename scalar_t>
struct TensorUpdate {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* in;
  scalar_t* out;  // == in for an update in place
  int64_t numel;
  acc_t scale;
  acc_t pull;
  AnchorPair pair;
  acc_t noise_std;
  NoiseKey key;
  PhiloxConstants philox;  // of the chunk
  int64_t noise_offset;
  bool store;  // false: only look for values that are not finite
};

// The squares that a thread has seen, of the elements as they were. The functions below take one,
// or none where no sum is wanted.
template <typename acc_t>
struct SquareSum {
  acc_t sum = 0;
  __device__ __forceinline__ void add(acc_t x) { sum += x * x; }
};

template <typename acc_t>
__device__ __forceinline__ bool is_finite(acc_t x) {
  return fabs(x) < static_cast<acc_t>(INFINITY);
}

// A factor of 0 adds nothing, even to a displacement that is not finite.
template <typename acc_t>
__device__ __forceinline__ acc_t add_scaled(acc_t value, acc_t factor, acc_t x) {
  return factor != acc_t(0) ? value + factor * x : value;
}

// Updates one pack, whose first element is `index`; false if a result is not finite.
template <bool kNoise, bool kVector, typename scalar_t, int kPack, typename... squares_t>
__device__ __forceinline__ bool update_pack(const TensorUpdate<scalar_t>& tensor, int64_t index,
                                            const acc_type<scalar_t> (&grad)[kPack],
                                            const acc_type<scalar_t> (&displacement)[kPack],
                                            scalar_t* out, squares_t&... squares) {
  using acc_t = acc_type<scalar_t>;
  acc_t values[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    (squares.add(grad[j]), ...);
    values[j] = add_scaled(tensor.scale * grad[j], tensor.pull, displacement[j]);
  }
  if constexpr (kNoise) {
    const uint32_t block = static_cast<uint32_t>((tensor.noise_offset + index) / kNoiseBlock);
#pragma unroll
    for (int b = 0; b < kPack / kNoiseBlock; ++b) {
      const NormalBlock normal = normal_block(philox4x32_10(tensor.philox, block + b));
#pragma unroll
      for (int j = 0; j < kNoiseBlock; ++j) {
        values[b * kNoiseBlock + j] += tensor.noise_std * static_cast<acc_t>(normal.z[j]);
      }
    }
  }
  bool finite = true;
  Pack<scalar_t, kPack> pack;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    pack.v[j] = round_to<scalar_t>(values[j]);
    finite = is_finite(widen<acc_t>(pack.v[j])) && finite;
  }
  if (tensor.store) store_pack<kVector>(out, pack);
  return finite;
}

// Updates this thread's packs of one batch, `valid` of which exist.
template <Anchors kAnchors, bool kNoise, bool kVector, int kPacks, typename scalar_t,
          typename... squares_t>
__device__ __forceinline__ bool update_batch(const TensorUpdate<scalar_t>& tensor, int64_t index,
                                             int valid, squares_t&... squares) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  constexpr int kStride = kThreads * kPack;
  acc_t grad[kPacks][kPack];
  acc_t displacement[kPacks][kPack] = {};
  load_batch<kVector>(tensor.in + index, kStride, valid, grad);
  if constexpr (kAnchors != Anchors::kNone) {
    if (tensor.pull != acc_t(0)) {
      load_displacements<kAnchors, scalar_t, kVector>(tensor.pair, index, kStride, valid,
                                                      displacement);
    }
  }
  bool finite = true;
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
    if (u < valid) {
      finite = update_pack<kNoise, kVector>(tensor, index + u * kStride, grad[u], displacement[u],
                                            tensor.out + index + u * kStride, squares...) &&
               finite;
    }
  }
  return finite;
}

// Updates `packs` packs from element `first` on.
template <Anchors kAnchors, bool kNoise, bool kVector, typename scalar_t, typename... squares_t>
__device__ __forceinline__ bool update_packs(const TensorUpdate<scalar_t>& tensor, int64_t first,
                                             int packs, squares_t&... squares) {
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  constexpr int kRegisters = kAnchors == Anchors::kNone && !kNoise ? 16 : 8;
  constexpr int kPacks = kVector ? kBatchPacks<scalar_t, kAnchors, kRegisters> : 1;
  bool finite = true;
  int p = threadIdx.x;
  for (; p + (kPacks - 1) * kThreads < packs; p += kPacks * kThreads) {
    finite = update_batch<kAnchors, kNoise, kVector, kPacks>(tensor, first + p * kPack, kPacks,
                                                             squares...) &&
             finite;
  }
  if (kPacks > 1 && p < packs) {
    const int valid = (packs - p + kThreads - 1) / kThreads;
    finite = update_batch<kAnchors, kNoise, kVector, kPacks>(tensor, first + p * kPack, valid,
                                                             squares...) &&
             finite;
  }
  return finite;
}

template <Anchors kAnchors, bool kNoise, typename scalar_t, typename... squares_t>
__device__ __forceinline__ bool update_element(const TensorUpdate<scalar_t>& tensor, int64_t index,
                                               squares_t&... squares) {
  using acc_t = acc_type<scalar_t>;
  const acc_t grad = widen<acc_t>(tensor.in[index]);
  (squares.add(grad), ...);
  acc_t value = tensor.scale * grad;
  if constexpr (kAnchors != Anchors::kNone) {
    if (tensor.pull != acc_t(0)) {
      value += tensor.pull * load_displacement<kAnchors, scalar_t>(tensor.pair, index);
    }
  }
  if (kNoise && tensor.noise_std != acc_t(0)) {
    const uint64_t element = static_cast<uint64_t>(tensor.noise_offset + index);
    const NormalBlock normal = normal_block(tensor.key, element / kNoiseBlock);
    // Selections, because indexing the array would move it to local memory.
    const float even = element & 2 ? normal.z[2] : normal.z[0];
    const float odd = element & 2 ? normal.z[3] : normal.z[1];
    value += tensor.noise_std * static_cast<acc_t>(element & 1 ? odd : even);
  }
  const scalar_t rounded = round_to<scalar_t>(value);
  if (tensor.store) tensor.out[index] = rounded;
  return is_finite(widen<acc_t>(rounded));
}

// Elements before the first pack.
template <bool kNoise, typename scalar_t>
__device__ __forceinline__ int head_elements(const TensorUpdate<scalar_t>& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.in);
  int head =
      static_cast<int>((kVectorBytes - address % kVectorBytes) % kVectorBytes / sizeof(scalar_t));
  if (kNoise && (tensor.noise_offset + head) % kNoiseBlock != 0) {
    head = static_cast<int>((kNoiseBlock - tensor.noise_offset % kNoiseBlock) % kNoiseBlock);
  }
  return head < tensor.numel ? head : static_cast<int>(tensor.numel);
}

// Updates one of the tensor's chunks of kUpdateChunk elements; false if the thread stored a value
// that is not finite. `squares` is a SquareSum of the elements that the thread has read, or none.
template <Anchors kAnchors, bool kNoise, typename scalar_t, typename... squares_t>
__device__ __forceinline__ bool update_chunk(TensorUpdate<scalar_t> tensor, int64_t chunk,
                                             squares_t&... squares) {
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  constexpr int kChunkPacks = kUpdateChunk / kPack;
  const int head = head_elements<kNoise>(tensor);
  const int64_t packs = (tensor.numel - head) / kPack;
  const int64_t begin = chunk * kChunkPacks;
  const int64_t left = packs - begin;
  const int here = left < kChunkPacks ? static_cast<int>(left) : kChunkPacks;
  const int64_t first = head + begin * kPack;
  bool vector = is_aligned(tensor.in + head) && is_aligned(tensor.out + head);
  if constexpr (kAnchors != Anchors::kNone) {
    vector = vector && is_aligned<kAnchors, scalar_t>(tensor.pair, head);
  }
  bool finite = true;
  if (kNoise && tensor.noise_std != acc_type<scalar_t>(0)) {
    const int64_t element = tensor.noise_offset + first;
    const int elements = here * kPack;
    tensor.philox = philox_constants(tensor.key, static_cast<uint32_t>(element / kNoiseSpan));
    if (element / kNoiseSpan != (element + elements - 1) / kNoiseSpan) {
      for (int i = threadIdx.x; i < elements; i += kThreads) {
        finite = update_element<kAnchors, true>(tensor, first + i, squares...) && finite;
      }
    } else if (vector) {
      finite = update_packs<kAnchors, true, true>(tensor, first, here, squares...);
    } else {
      finite = update_packs<kAnchors, true, false>(tensor, first, here, squares...);
    }
  } else if (vector) {
    finite = update_packs<kAnchors, false, true>(tensor, first, here, squares...);
  } else {
    finite = update_packs<kAnchors, false, false>(tensor, first, here, squares...);
  }
  const int tail = static_cast<int>(tensor.numel - head - packs * kPack);
  const int thread = threadIdx.x;
  if (chunk == 0 && thread < head + tail) {
    const int64_t index = thread < head ? thread : tensor.numel - head - tail + thread;
    finite = update_element<kAnchors, kNoise>(tensor, index, squares...) && finite;
  }
  return finite;
}

}  // namespace mmfuse::cuda
