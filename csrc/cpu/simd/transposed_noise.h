// The noise of a tensor in channels_last: drawn by the logical index, a tile at a time, and turned
// into the order of memory in L1; no include guard, see foreach_simd.h.

// Part of one row, or several whole ones. In memory a row is [spatial, channels], logically
// [channels, spatial]; only whole rows come several at a time.
struct TransposedTile {
  int64_t begin;    // the first element's place in memory
  int64_t logical;  // and its logical index
  int64_t rows;
  int64_t channels;
  int64_t spatial;

  int64_t size() const { return rows * channels * spatial; }
};

// How rows of a shape are cut. Many draws of NormalSource in a tile, so that the last of them,
// which may be cut short, counts little.
class TransposedTiling {
 public:
  // 32 KB of noise, for rows of a 3 x 3 kernel with 910 channels.
  static constexpr int64_t kMost = 8192;
  static constexpr int64_t kEnough = 4096;
  static constexpr int64_t kFewChannels = 16;  // a cache line's

  TransposedTiling(int64_t channels, int64_t spatial) : channels_(channels), spatial_(spatial) {
    const int64_t row = channels * spatial;
    rows_ = std::max<int64_t>(1, kEnough / row);
    tile_channels_ = channels;
    tile_spatial_ = spatial;
    if (row <= kMost) return;
    const int64_t fit = kMost / spatial / kFewChannels * kFewChannels;
    tile_channels_ = std::min(channels, std::max(kFewChannels, fit));
    tile_spatial_ = std::min(spatial, kMost / tile_channels_);
  }

  // Calls f(tile) for all tiles of the `size` elements from `begin` on, which are whole rows.
  template <typename F>
  void visit(int64_t begin, int64_t size, const F& f) const {
    const int64_t row = channels_ * spatial_;
    for (int64_t at = begin; at < begin + size; at += rows_ * row) {
      const int64_t rows = std::min(rows_, (begin + size - at) / row);
      for (int64_t c = 0; c < channels_; c += tile_channels_) {
        for (int64_t s = 0; s < spatial_; s += tile_spatial_) {
          f(TransposedTile{at + s * channels_ + c, at + c * spatial_ + s, rows,
                           std::min(tile_channels_, channels_ - c),
                           std::min(tile_spatial_, spatial_ - s)});
        }
      }
    }
  }

 private:
  int64_t channels_, spatial_;
  int64_t rows_, tile_channels_, tile_spatial_;
};

// The deviates of one tensor, a tile at a time.
class TransposedNormals {
 public:
  TransposedNormals(const NoiseKey& key, int64_t offset, int64_t spatial)
      : source_(key, offset), offset_(offset), spatial_(spatial) {}

  // The deviates of a tile as [rows, spatial, channels], valid until the next call.
  template <typename scalar_t>
  const float* draw(const TransposedTile& tile, const scalar_t* elements) {
    if (tile.spatial == spatial_) {  // then channels adjoin, and rows do
      draw_run(tile, 0, tile.logical, tile.size(), elements);
    } else {
      for (int64_t c = 0; c < tile.channels; ++c) {
        draw_run(tile, c, tile.logical + c * spatial_, tile.spatial, elements + c);
      }
    }
    return normals_;
  }

 private:
  // `count` logically consecutive elements from the beginning of the tile's channel `channel` on.
  template <typename scalar_t>
  void draw_run(const TransposedTile& tile, int64_t channel, int64_t logical, int64_t count,
                const scalar_t* elements) {
    Place place{normals_ + channel, channel, 0};
    int64_t n;
    for (int64_t done = 0; done < count; done += n) {
      const int64_t element = offset_ + logical + done;
      // Up to the end of a block, so that the next draw begins with one.
      n = std::min(NormalSource::kTile - element % kNoiseBlock, count - done);
      n = std::min(n, NormalSource::kSpan - element % NormalSource::kSpan);
      scatter(tile, source_.draw(element, n, elements + done), n, &place);
    }
  }

  // The place of the next deviate: its row and channel, and the place in that channel.
  struct Place {
    float* first;  // of the channel
    int64_t channel;
    int64_t s;
  };

  static void next_channel(const TransposedTile& tile, int64_t count, Place* place) {
    place->channel += count;
    place->first += count;
    if (place->channel < tile.channels) return;
    place->channel = 0;
    place->first += tile.channels * (tile.spatial - 1);
  }

  void scatter(const TransposedTile& tile, const float* z, int64_t n, Place* place) {
    while (n > 0) {
      if (place->s == 0 && n >= kBlock * tile.spatial && place->channel + kBlock <= tile.channels) {
        if (tile.spatial == 9) {  // 3 x 3 kernels: without a loop
          scatter_block<9>(9, tile.channels, z, place->first);
        } else {
          scatter_block<0>(tile.spatial, tile.channels, z, place->first);
        }
        z += kBlock * tile.spatial;
        n -= kBlock * tile.spatial;
        next_channel(tile, kBlock, place);
        continue;
      }
      const int64_t count = std::min(n, tile.spatial - place->s);
      float* to = place->first + place->s * tile.channels;
      for (int64_t i = 0; i < count; ++i) to[i * tile.channels] = z[i];
      z += count;
      n -= count;
      place->s += count;
      if (place->s < tile.spatial) return;
      place->s = 0;
      next_channel(tile, 1, place);
    }
  }

  static constexpr int kBlock = 4;  // channels that are scattered side by side
  typedef float Quad __attribute__((vector_size(16)));

  static Quad load_quad(const float* p) {
    Quad q;
    std::memcpy(&q, p, sizeof q);
    return q;
  }

  // kSpatial, where not 0, is `places`, known when compiling.
  template <int kSpatial>
  static void scatter_block(int64_t places, int64_t channels, const float* z, float* to) {
    const int64_t spatial = kSpatial > 0 ? kSpatial : places;
    int64_t s = 0;
    for (; s + kBlock <= spatial; s += kBlock) {
      const Quad a = load_quad(z + s), b = load_quad(z + spatial + s);
      const Quad c = load_quad(z + 2 * spatial + s), d = load_quad(z + 3 * spatial + s);
      const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Quad ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quad cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Quad out[kBlock] = {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
                                __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
                                __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                                __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
      MMFUSE_UNROLL for (int i = 0; i < kBlock; ++i) {
        std::memcpy(to + (s + i) * channels, &out[i], sizeof(Quad));
      }
    }
    for (; s < spatial; ++s) {
      const Quad out = {z[s], z[spatial + s], z[2 * spatial + s], z[3 * spatial + s]};
      std::memcpy(to + s * channels, &out, sizeof out);
    }
  }

  NormalSource source_;
  int64_t offset_, spatial_;
  float normals_[TransposedTiling::kMost];
};
