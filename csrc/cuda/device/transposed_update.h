// The noisy update of a tensor in channels_last, whose noise goes by the logical index.
//
// A block has a tile: several rows, or part of one. In memory it is [rows, spatial, channels],
// logically [rows, channels, spatial]. The block draws the deviates in logical order, four from a
// Philox block, into shared memory, and meanwhile waits for the gradients' first packs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "update_tensor.h"

namespace mmfuse::cuda {

// The quotient of numbers below 2^16 by one multiplication.
class SmallDivisor {
 public:
  __device__ __forceinline__ explicit SmallDivisor(int divisor)
      : divisor_(divisor), inverse_(0xFFFFFFFFu / static_cast<uint32_t>(divisor) + 1) {}

  __device__ __forceinline__ int divide(int number) const {
    if (divisor_ == 1) return number;
    return static_cast<int>(multiply_wide(static_cast<uint32_t>(number), inverse_).high);
  }

 private:
  int divisor_;
  uint32_t inverse_;
};

// One block's tile of a tensor.
struct TransposedTile {
  int64_t begin;    // the first element's place in memory
  int64_t logical;  // and its logical index
  int rows;
  int channels;
  int spatial;
};

__device__ __forceinline__ TransposedTile transposed_tile(const TransposedTiling& tiling,
                                                          int channels, int spatial, int64_t numel,
                                                          int tile) {
  const int channel_tiles = tiling.channel_tiles(channels);
  const int spatial_tiles = tiling.spatial_tiles(spatial);
  const int s = tile % spatial_tiles * tiling.spatial;
  const int c = tile / spatial_tiles % channel_tiles * tiling.channels;
  const int64_t row = static_cast<int64_t>(tile / spatial_tiles / channel_tiles) * tiling.rows;
  const int64_t begin = row * channels * spatial;
  const int64_t rows = numel / (channels * spatial) - row;
  return {begin + s * channels + c, begin + c * spatial + s,
          rows < tiling.rows ? static_cast<int>(rows) : tiling.rows,
          channels - c < tiling.channels ? channels - c : tiling.channels,
          spatial - s < tiling.spatial ? spatial - s : tiling.spatial};
}

// The places of a tile's deviates in shared memory: in logical order, one run of them or, if the
// tile has only some places of its channels, one for each channel.
class TileNoise {
 public:
  __device__ __forceinline__ TileNoise(const TransposedTile& tile, int64_t noise_offset,
                                       int row_spatial, float* normals)
      : normals_(normals),
        element_(noise_offset + tile.logical),
        joined_(tile.spatial == row_spatial),
        row_spatial_(row_spatial) {
    spatial_ = tile.spatial;
    length_ = joined_ ? tile.rows * tile.channels * tile.spatial : tile.spatial;
    runs_ = joined_ ? 1 : tile.channels;
    // A single run keeps what its first block has before it, so that whole blocks are stored.
    base_ = joined_ ? static_cast<int>(element_ % kNoiseBlock) : 0;
  }

  // All threads of the block; they have to meet before they read.
  __device__ __forceinline__ void draw(const NoiseKey& key) const {
    // A run may begin up to three elements after a block does.
    const int blocks = (length_ + 2 * kNoiseBlock - 2) / kNoiseBlock;
    const PhiloxConstants philox =
        philox_constants(key, static_cast<uint32_t>(element_ / kNoiseSpan));
    const SmallDivisor by_blocks(blocks);
    for (int i = threadIdx.x; i < runs_ * blocks; i += kThreads) {
      const int run = by_blocks.divide(i);
      const int64_t first = element_ + static_cast<int64_t>(run) * row_spatial_;
      const int at = (i - run * blocks) * kNoiseBlock - static_cast<int>(first % kNoiseBlock);
      if (at >= length_) continue;
      const int64_t block = (first + at) / kNoiseBlock;
      const bool same_span = block / (kNoiseSpan / kNoiseBlock) == element_ / kNoiseSpan;
      const NormalBlock normal =
          normal_block(same_span ? philox4x32_10(philox, static_cast<uint32_t>(block))
                                 : philox4x32_10(key, static_cast<uint64_t>(block)));
      if (joined_) {
        Pack<float, kNoiseBlock> pack;
#pragma unroll
        for (int j = 0; j < kNoiseBlock; ++j) pack.v[j] = normal.z[j];
        store_pack<true>(normals_ + i * kNoiseBlock, pack);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kNoiseBlock; ++j) {
        if (at + j >= 0 && at + j < length_) normals_[run * length_ + at + j] = normal.z[j];
      }
    }
  }

  // The deviate of an element whose channel, counted through the tile's rows, and place are these.
  __device__ __forceinline__ float at(int channel, int s) const {
    return normals_[base_ + channel * spatial_ + s];
  }

 private:
  float* normals_;
  int64_t element_;  // the first one's place in the noise
  bool joined_;
  int row_spatial_;
  int spatial_;
  int length_;
  int runs_;
  int base_;
};

// Several packs of a thread, loaded together; a pack is kPack channels of one place.
template <Anchors kAnchors, int kPack, typename scalar_t>
class TransposedBatch {
 public:
  using acc_t = acc_type<scalar_t>;
  static constexpr int kPacks = 4;
  static constexpr int kElements = kPacks * kPack * kThreads;

  __device__ __forceinline__ TransposedBatch(const TensorUpdate<scalar_t>& tensor,
                                             const TransposedTile& tile, int channels, int spatial)
      : tensor_(tensor),
        tile_(tile),
        channels_(channels),
        spatial_(spatial),
        by_channels_(tile.channels),
        by_spatial_(tile.spatial) {}

  // The batch whose first element, counted through the tile in the order of memory, is `first`.
  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int i = first + (u * kThreads + threadIdx.x) * kPack;
      if (i >= size()) continue;
      const int64_t index = find(i).index;
      acc_t grad[1][kPack], displacement[1][kPack] = {};
      load_batch<(kPack > 1)>(tensor_.in + index, 0, 1, grad);
      if constexpr (kAnchors != Anchors::kNone) {
        if (tensor_.pull != acc_t(0)) {
          load_displacements<kAnchors, scalar_t, (kPack > 1)>(tensor_.pair, index, 0, 1,
                                                              displacement);
        }
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        grad_[u][j] = grad[0][j];
        displacement_[u][j] = displacement[0][j];
      }
    }
  }

  // Stores it; false if a result is not finite.
  __device__ __forceinline__ bool finish(int first, const TileNoise& noise) const {
    bool finite = true;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int i = first + (u * kThreads + threadIdx.x) * kPack;
      if (i >= size()) continue;
      const Element at = find(i);
      Pack<scalar_t, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        acc_t value = add_scaled(tensor_.scale * grad_[u][j], tensor_.pull, displacement_[u][j]);
        if (tensor_.noise_std != acc_t(0)) {
          value += tensor_.noise_std * static_cast<acc_t>(noise.at(at.channel + j, at.s));
        }
        pack.v[j] = round_to<scalar_t>(value);
        finite = is_finite(widen<acc_t>(pack.v[j])) && finite;
      }
      if (tensor_.store) store_pack<(kPack > 1)>(tensor_.out + at.index, pack);
    }
    return finite;
  }

  __device__ __forceinline__ int size() const {
    return tile_.rows * tile_.channels * tile_.spatial;
  }

 private:
  struct Element {
    int64_t index;  // in memory
    int channel;    // counted through the tile's rows
    int s;
  };

  __device__ __forceinline__ Element find(int i) const {
    const int place = by_channels_.divide(i);
    const int c = i - place * tile_.channels;
    const int row = by_spatial_.divide(place);
    const int s = place - row * tile_.spatial;
    return {tile_.begin + (row * spatial_ + s) * channels_ + c, row * tile_.channels + c, s};
  }

  const TensorUpdate<scalar_t>& tensor_;
  const TransposedTile& tile_;
  int channels_;  // of a whole row
  int spatial_;
  SmallDivisor by_channels_;
  SmallDivisor by_spatial_;
  acc_t grad_[kPacks][kPack];
  acc_t displacement_[kPacks][kPack];
};

// Updates one tile; false if the thread stored a value that is not finite.
template <Anchors kAnchors, int kPack, typename scalar_t>
__device__ __forceinline__ bool update_tile(const TensorUpdate<scalar_t>& tensor,
                                            const TransposedTile& tile, int channels, int spatial,
                                            float* normals) {
  const TileNoise noise(tile, tensor.noise_offset, spatial, normals);
  TransposedBatch<kAnchors, kPack, scalar_t> batch(tensor, tile, channels, spatial);
  batch.load(0);
  if (tensor.noise_std != acc_type<scalar_t>(0)) noise.draw(tensor.key);
  __syncthreads();
  bool finite = batch.finish(0, noise);
  for (int first = batch.kElements; first < batch.size(); first += batch.kElements) {
    batch.load(first);
    finite = batch.finish(first, noise) && finite;
  }
  return finite;
}

// Updates a tensor's tile of this number, with noise.
template <Anchors kAnchors, typename scalar_t>
__device__ __forceinline__ bool update_transposed(const TensorUpdate<scalar_t>& tensor,
                                                  int channels, int spatial, int number,
                                                  float* normals) {
  const TransposedTile tile = transposed_tile(transposed_tiling(channels, spatial), channels,
                                              spatial, tensor.numel, number);
  bool vector = channels % kNoiseBlock == 0 && is_aligned(tensor.in);
  if constexpr (kAnchors != Anchors::kNone) {
    vector = vector && is_aligned<kAnchors, scalar_t>(tensor.pair, 0);
  }
  return vector ? update_tile<kAnchors, kNoiseBlock>(tensor, tile, channels, spatial, normals)
                : update_tile<kAnchors, 1>(tensor, tile, channels, spatial, normals);
}

}  // namespace mmfuse::cuda
