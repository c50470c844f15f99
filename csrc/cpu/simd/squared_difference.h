// Sum of (x - y)^2; no include guard, see foreach_simd.h.

// Few enough elements to sum in the accumulator's own precision.
constexpr int64_t kDifferenceTile = 4096;

// A version for a sum beyond float's range, whose mean may well be within it.
template <typename scalar_t>
inline double wide_squared_difference(const scalar_t* x, const scalar_t* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(Element<scalar_t>::widen(x[i])) -
                     static_cast<double>(Element<scalar_t>::widen(y[i]));
    sum += d * d;
  }
  return sum;
}

template <typename scalar_t>
inline double tile_squared_difference(const scalar_t* x, const scalar_t* y, int64_t n) {
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = 4;
  vec_t sum[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    MMFUSE_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const vec_t d = load(x + i + u * kWidth) - load(y + i + u * kWidth);
      sum[u] = multiply_add(d, d, sum[u]);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t rest = n - i;
    const vec_t d = rest >= kWidth ? load(x + i) - load(y + i)
                                   : load_first(x + i, rest, 0) - load_first(y + i, rest, 0);
    sum[0] = multiply_add(d, d, sum[0]);
  }
  const double total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (std::is_same_v<acc_type<scalar_t>, double> || std::isfinite(total)) return total;
  return wide_squared_difference(x, y, n);
}

template <typename scalar_t>
inline double squared_difference(const scalar_t* x, const scalar_t* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kDifferenceTile) {
    sum += tile_squared_difference(x + i, y + i, std::min(kDifferenceTile, n - i));
  }
  return sum;
}
