// The update of one stretch of a gradient; no include guard, see foreach_simd.h.
#include "noise_kernel.h"
#include "transposed_noise.h"
#include "widen.h"

// With the noise and both widened tensors, a tile stays in L1.
constexpr int64_t kUpdateTile = NormalSource::kTile;

// Few enough elements to sum in the accumulator's own precision.
template <typename scalar_t>
inline double tile_squares(const scalar_t* x, int64_t n) {
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = 4;
  vec_type<scalar_t> sum[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    MMFUSE_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const vec_type<scalar_t> v = load(x + i + u * kWidth);
      sum[u] = multiply_add(v, v, sum[u]);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t rest = n - i;
    const vec_type<scalar_t> v = rest >= kWidth ? load(x + i) : load_first(x + i, rest, 0);
    sum[0] = multiply_add(v, v, sum[0]);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename scalar_t, typename param_t>
struct UpdateTile {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* in;
  scalar_t* out;
  const param_t* param;
  const param_t* anchor;
  const float* normals;
  acc_t scale;
  acc_t pull;
  acc_t noise_std;
};

template <Second kSecond, bool kNoise, typename scalar_t, typename param_t>
inline vec_type<scalar_t> updated(const UpdateTile<scalar_t, param_t>& tile, int64_t i) {
  vec_type<scalar_t> x = load(tile.in + i) * tile.scale;
  if constexpr (kSecond != Second::kNone) {
    const auto moved = load_displacement<kSecond>(tile.param, tile.anchor, i);
    x = multiply_add(splat(tile.pull), moved, x);
  }
  if constexpr (kNoise) {
    x = multiply_add(splat(tile.noise_std), load_as(tile.normals + i, tile.noise_std), x);
  }
  return x;
}

// False when a stored value is NaN or infinite.
template <Second kSecond, bool kNoise, typename scalar_t, typename param_t>
inline bool update_tile(const UpdateTile<scalar_t, param_t>& given, int64_t n) {
  // Copied, so that stores cannot alias it, and member by member: a vector read where members were
  // written one by one waits until all stores before it are in the cache.
  UpdateTile<scalar_t, param_t> tile;
  tile.in = given.in;
  tile.out = given.out;
  tile.param = given.param;
  tile.anchor = given.anchor;
  tile.normals = given.normals;
  tile.scale = given.scale;
  tile.pull = given.pull;
  tile.noise_std = given.noise_std;
  using Check = FiniteCheck<scalar_t>;
  constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  Check check;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    typename Check::Bits bits;
    if constexpr (sizeof(scalar_t) == 2) {
      bits = pack(updated<kSecond, kNoise>(tile, i), updated<kSecond, kNoise>(tile, i + kLanes),
                  scalar_t());
    } else {
      bits = (typename Check::Bits)updated<kSecond, kNoise>(tile, i);
    }
    std::memcpy(tile.out + i, &bits, sizeof bits);
    check.see(bits);
  }
  if (i == n) return check.passed();
  if constexpr (kSecond == Second::kNone && !kNoise && sizeof(scalar_t) >= 4) {
    // A product rounds alike wherever it is made, and a padded vector waits for stores as well.
    bool finite = true;
    for (; i < n; ++i) {
      const scalar_t x = tile.in[i] * tile.scale;
      tile.out[i] = x;
      finite &= std::abs(x) <= std::numeric_limits<scalar_t>::max();
    }
    return check.passed() && finite;
  }
  // The rest once more through the loop above, padded with zeros: where an element ends up in a
  // vector must not change its rounding.
  scalar_t in[kWidth]{}, out[kWidth];
  param_t param[kWidth]{}, anchor[kWidth]{};
  float normals[kWidth]{};
  std::copy(tile.in + i, tile.in + n, in);
  if constexpr (kSecond != Second::kNone) std::copy(tile.param + i, tile.param + n, param);
  if constexpr (kSecond == Second::kBoth) std::copy(tile.anchor + i, tile.anchor + n, anchor);
  if constexpr (kNoise) std::copy(tile.normals + i, tile.normals + n, normals);
  UpdateTile<scalar_t, param_t> rest = tile;
  rest.in = in;
  rest.out = out;
  rest.param = param;
  rest.anchor = anchor;
  rest.normals = normals;
  const bool rest_finite = update_tile<kSecond, kNoise>(rest, kWidth);
  std::copy(out, out + (n - i), tile.out + i);
  return check.passed() && rest_finite;
}

// The `n` elements from `begin` on, one after another in memory, with these normals: at most
// kUpdateTile of them, unless they are scaled alone.
template <Second kSecond, bool kNoise, typename scalar_t, typename param_t>
class StretchUpdate {
 public:
  StretchUpdate(const UpdateSlice& slice, double* squares) : slice_(slice), squares_(squares) {}

  const scalar_t* in(int64_t begin) const {
    return static_cast<const scalar_t*>(slice_.in) + begin;
  }

  void add_squares_to(double* squares) { squares_ = squares; }

  void run(int64_t begin, int64_t n, const float* normals) {
    using acc_t = acc_type<scalar_t>;
    UpdateTile<scalar_t, param_t> tile{};
    tile.in = in(begin);
    tile.out = static_cast<scalar_t*>(slice_.out) + begin;
    tile.normals = normals;
    tile.scale = static_cast<acc_t>(slice_.scale);
    tile.pull = static_cast<acc_t>(slice_.pull);
    tile.noise_std = static_cast<acc_t>(slice_.noise_std);
    if constexpr (kSecond != Second::kNone) {
      tile.param = tile_as(slice_.param, slice_.param_dtype, begin, n, param_buffer_);
    }
    if constexpr (kSecond == Second::kBoth) {
      tile.anchor = tile_as(slice_.anchor, slice_.anchor_dtype, begin, n, anchor_buffer_);
    }
    // A loop of its own leaves the update's as it is; what it has read is then in L1.
    if (squares_ != nullptr) *squares_ += tile_squares(tile.in, n);
    finite_ &= update_tile<kSecond, kNoise>(tile, n);
  }

  // False when a stored value is NaN or infinite.
  bool finite() const { return finite_; }

 private:
  const UpdateSlice& slice_;
  double* squares_;
  bool finite_ = true;
  param_t param_buffer_[kUpdateTile], anchor_buffer_[kUpdateTile];
};

template <Second kSecond, bool kNoise, typename scalar_t, typename param_t = acc_type<scalar_t>>
inline bool update_tiles(const UpdateSlice& slice, double* squares) {
  StretchUpdate<kSecond, kNoise, scalar_t, param_t> update(slice, squares);
  NormalSource normals(slice.noise_key, slice.noise_offset + slice.begin);
  // A product alone puts nothing in a buffer, so that its loop need not end with a tile.
  const bool plain = kSecond == Second::kNone && !kNoise && squares == nullptr;
  const int64_t longest = plain ? slice.size : kUpdateTile;
  int64_t n;
  for (int64_t done = 0; done < slice.size; done += n) {
    const int64_t begin = slice.begin + done;
    const int64_t element = slice.noise_offset + begin;
    n = std::min(longest, slice.size - done);
    const float* drawn = nullptr;
    if constexpr (kNoise) {
      n = std::min(n, NormalSource::kSpan - element % NormalSource::kSpan);
      drawn = normals.draw(element, n, update.in(begin));
    }
    update.run(begin, n, drawn);
  }
  return update.finite();
}

// With noise, of whole rows of a tensor in channels_last.
template <Second kSecond, typename scalar_t, typename param_t = acc_type<scalar_t>>
inline bool update_transposed(const UpdateSlice& slice, double* squares) {
  StretchUpdate<kSecond, true, scalar_t, param_t> update(slice, squares);
  TransposedNormals normals(slice.noise_key, slice.noise_offset, slice.spatial);
  const TransposedTiling tiling(slice.channels, slice.spatial);
  tiling.visit(slice.begin, slice.size, [&](const TransposedTile& tile) {
    const float* drawn = normals.draw(tile, update.in(tile.begin));
    // Whole rows lie one after another; of a part of one only the channels of a place do.
    const bool whole = tile.channels == slice.channels && tile.spatial == slice.spatial;
    const int64_t stretch = whole ? tile.size() : tile.channels;
    const int64_t stretches = whole ? 1 : tile.spatial;
    // A few channels' squares a time: added to the whole one by one they would round too often.
    constexpr int64_t kFew = 64;
    double few = 0, all = 0;
    if (squares != nullptr) update.add_squares_to(&few);
    for (int64_t i = 0; i < stretches; ++i) {
      if (i % kFew == 0) {
        all += few;
        few = 0;
      }
      for (int64_t done = 0; done < stretch; done += kUpdateTile) {
        update.run(tile.begin + i * slice.channels + done, std::min(kUpdateTile, stretch - done),
                   drawn + i * stretch + done);
      }
    }
    if (squares != nullptr) *squares += all + few;
  });
  return update.finite();
}

template <Second kSecond, typename scalar_t, typename param_t = acc_type<scalar_t>>
inline bool update_noisily(const UpdateSlice& slice, double* squares) {
  return is_transposed(slice) ? update_transposed<kSecond, scalar_t, param_t>(slice, squares)
                              : update_tiles<kSecond, true, scalar_t, param_t>(slice, squares);
}

template <typename scalar_t>
inline bool all_finite(const scalar_t* x, int64_t n) {
  using Bits = typename FiniteCheck<scalar_t>::Bits;
  constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  FiniteCheck<scalar_t> check;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) check.see(load_bits<Bits>(x + i));
  Bits rest{};
  std::memcpy(&rest, x + i, (n - i) * sizeof(scalar_t));
  check.see(rest);
  return check.passed();
}

// A loop for a tensor that stays as it is.
template <typename scalar_t>
inline bool look_at_tiles(const scalar_t* x, int64_t size, double* squares) {
  if (squares == nullptr) return all_finite(x, size);
  bool finite = true;
  for (int64_t i = 0; i < size; i += kUpdateTile) {
    const int64_t n = std::min(kUpdateTile, size - i);
    *squares += tile_squares(x + i, n);
    finite &= all_finite(x + i, n);
  }
  return finite;
}

// False when a stored value is NaN or infinite. Adds the squares of what was there to `squares`,
// unless it is null.
inline bool update_slice(const UpdateSlice& slice, double* squares) {
  return visit_dtype(slice.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (is_identity(slice)) {
      const scalar_t* in = static_cast<const scalar_t*>(slice.in) + slice.begin;
      return look_at_tiles(in, slice.size, squares);
    }
    const bool noise = slice.noise_std != 0;
    if (slice.pull == 0) {
      return noise ? update_noisily<Second::kNone, scalar_t>(slice, squares)
                   : update_tiles<Second::kNone, false, scalar_t>(slice, squares);
    }
    const Second second = second_of(slice.param, slice.anchor);
    const bool alike = slice.param_dtype == slice.dtype &&
                       (second == Second::kParams || slice.anchor_dtype == slice.dtype);
    return visit_params(second, [&](auto given) {
      constexpr Second kSecond = given.value;
      if (noise) {
        return alike ? update_noisily<kSecond, scalar_t, scalar_t>(slice, squares)
                     : update_noisily<kSecond, scalar_t>(slice, squares);
      }
      return alike ? update_tiles<kSecond, false, scalar_t, scalar_t>(slice, squares)
                   : update_tiles<kSecond, false, scalar_t>(slice, squares);
    });
  });
}
