// Moments of one stretch of a gradient; no include guard, see foreach_simd.h.
#include "cpu/simd/widen.h"

// Few enough elements to stay in L1 with both buffers.
constexpr int64_t kStatsTile = 4096;
// Vectors that are summed one after the other, before their sum is added to the others'.
constexpr int64_t kStatsRun = 16;
// Elements of a slice's first tile that give its shift.
constexpr int64_t kPilot = 512;

// Sums of x - shift and of its squares, and of the products with the displacement.
struct TileSums {
  double sum = 0;
  double squares = 0;
  double dot = 0;
  double disp_sq = 0;
};

template <int kCount, typename vec_t>
inline vec_t fold(const vec_t (&parts)[kCount]) {
  vec_t sum = parts[0];
  for (int u = 1; u < kCount; ++u) sum += parts[u];
  return sum;
}

template <Second kSecond, typename scalar_t, typename param_t>
inline TileSums tile_sums(acc_type<scalar_t> shift, const scalar_t* grad, const param_t* param,
                          const param_t* anchor, int64_t n) {
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = kSecond == Second::kNone ? 4 : 2;
  constexpr int64_t kStep = kUnroll * kWidth;
  vec_t sums{}, all_squares{}, dots{}, all_disp_sq{};
  int64_t i = 0;
  for (const int64_t whole = n - n % kStep; i < whole;) {
    vec_t sum[kUnroll]{}, squares[kUnroll]{}, dot[kUnroll]{}, disp_sq[kUnroll]{};
    for (const int64_t end = std::min(whole, i + kStatsRun * kStep); i < end; i += kStep) {
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * kWidth;
        const vec_t g = load(grad + at);
        const vec_t d = g - shift;
        sum[u] += d;
        squares[u] = multiply_add(d, d, squares[u]);
        if constexpr (kSecond != Second::kNone) {
          const vec_t moved = load_displacement<kSecond>(param, anchor, at);
          dot[u] = multiply_add(moved, g, dot[u]);
          disp_sq[u] = multiply_add(moved, moved, disp_sq[u]);
        }
      }
    }
    sums += fold(sum);
    all_squares += fold(squares);
    if constexpr (kSecond != Second::kNone) {
      dots += fold(dot);
      all_disp_sq += fold(disp_sq);
    }
  }
  TileSums out{sum_lanes(sums), sum_lanes(all_squares), sum_lanes(dots), sum_lanes(all_disp_sq)};
  for (; i < n; ++i) {
    const double g = Element<scalar_t>::widen(grad[i]);
    const double d = g - shift;
    out.sum += d;
    out.squares += d * d;
    if constexpr (kSecond != Second::kNone) {
      double moved = Element<param_t>::widen(param[i]);
      if constexpr (kSecond == Second::kBoth) moved -= Element<param_t>::widen(anchor[i]);
      out.dot += moved * g;
      out.disp_sq += moved * moved;
    }
  }
  return out;
}

// The mean of the first elements, which are made smaller so that their sum is no infinity.
template <typename scalar_t>
inline acc_type<scalar_t> pilot_of(const scalar_t* grad, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = 4;
  const int64_t count = std::min(kPilot, n - n % (kUnroll * kWidth));
  if (count == 0) return Element<scalar_t>::widen(grad[0]);
  vec_t sum[kUnroll]{};
  const vec_t part = splat(acc_t(1) / kPilot);
  for (int64_t i = 0; i < count; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] = multiply_add(load(grad + i + u * kWidth), part, sum[u]);
    }
  }
  const double times = static_cast<double>(kPilot) / static_cast<double>(count);
  return static_cast<acc_t>(sum_lanes(fold(sum)) * times);
}

// Mean and m2 where squares are beyond float's range, though their sum or the mean may be within.
template <typename scalar_t>
inline void wide_spread(const scalar_t* grad, int64_t n, Moments<double>* out) {
  constexpr int kWidth = lanes_of<scalar_t>;
  double sums[kWidth] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    acc_type<scalar_t> x[kWidth];
    store(x, load(grad + i));
    for (int lane = 0; lane < kWidth; ++lane) sums[lane] += x[lane];
  }
  for (; i < n; ++i) sum += Element<scalar_t>::widen(grad[i]);
  for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];
  out->mean = sum / n;
  out->m2 = 0;
  if (!std::isfinite(sum)) out->m2 = std::numeric_limits<double>::quiet_NaN();
  for (i = 0; i < n && std::isfinite(sum); ++i) {
    const double d = Element<scalar_t>::widen(grad[i]) - out->mean;
    out->m2 += d * d;
  }
}

// The same of the products with the displacement.
template <Second kSecond, typename scalar_t, typename param_t>
inline void wide_products(const scalar_t* grad, const param_t* param, const param_t* anchor,
                          int64_t n, Moments<double>* out) {
  out->dot = out->disp_sq = 0;
  for (int64_t i = 0; i < n; ++i) {
    double moved = Element<param_t>::widen(param[i]);
    if constexpr (kSecond == Second::kBoth) moved -= Element<param_t>::widen(anchor[i]);
    out->dot += moved * Element<scalar_t>::widen(grad[i]);
    out->disp_sq += moved * moved;
  }
}

// One pass over x - shift. Another one about the mean, if of the squares' sum more than a share of
// 1 / `least` comes from the shift being off, which would cancel.
template <Second kSecond, typename scalar_t, typename param_t>
inline Moments<double> tile_moments(acc_type<scalar_t> shift, double least, const scalar_t* grad,
                                    const param_t* param, const param_t* anchor, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  TileSums sums = tile_sums<kSecond>(shift, grad, param, anchor, n);
  const double off = sums.sum / n;
  if (least * (off * sums.sum) > sums.squares) {
    shift = static_cast<acc_t>(shift + off);
    sums = tile_sums<kSecond>(shift, grad, param, anchor, n);
  }
  Moments<double> out;
  out.n = n;
  out.mean = shift + sums.sum / n;
  // Rounding can push the difference below zero; NaN must stay, hence the order of the operands.
  out.m2 = std::max(sums.squares - sums.sum * (sums.sum / n), 0.0);
  out.dot = sums.dot;
  out.disp_sq = sums.disp_sq;
  if constexpr (!std::is_same_v<acc_t, double>) {
    if (!std::isfinite(sums.squares)) wide_spread(grad, n, &out);
    if constexpr (kSecond != Second::kNone) {
      const bool lost = !std::isfinite(sums.disp_sq) || !std::isfinite(sums.dot);
      if (lost) wide_products<kSecond>(grad, param, anchor, n, &out);
    }
  }
  return out;
}

template <Second kSecond, typename scalar_t, typename param_t>
inline Moments<double> tiles_moments(const StatsSlice& slice) {
  using acc_t = acc_type<scalar_t>;
  param_t param_buffer[kStatsTile], anchor_buffer[kStatsTile];
  const param_t* param = nullptr;
  const param_t* anchor = nullptr;
  Moments<double> out;
  double last = std::numeric_limits<double>::quiet_NaN();
  for (int64_t done = 0; done < slice.size; done += kStatsTile) {
    const int64_t begin = slice.begin + done;
    const int64_t n = std::min(kStatsTile, slice.size - done);
    if constexpr (kSecond != Second::kNone) {
      param = tile_as(slice.param, slice.param_dtype, begin, n, param_buffer);
    }
    if constexpr (kSecond == Second::kBoth) {
      anchor = tile_as(slice.anchor, slice.anchor_dtype, begin, n, anchor_buffer);
    }
    const scalar_t* grad = static_cast<const scalar_t*>(slice.grad) + begin;
    // A mean is no larger than its tile's elements are on average, a pilot may be: hence the 32.
    // The other factor lets squares be four times m2, as of rows whose means differ.
    const bool follows = std::isfinite(last);
    const acc_t shift = follows ? static_cast<acc_t>(last) : pilot_of(grad, n);
    const auto tile = tile_moments<kSecond>(shift, follows ? 4.0 / 3 : 32, grad, param, anchor, n);
    out = merge_moments(out, tile);
    last = tile.mean;
  }
  return out;
}

inline Moments<double> slice_moments(const StatsSlice& slice) {
  return visit_dtype(slice.grad_dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    const Second second = second_of(slice.param, slice.anchor);
    if (second == Second::kNone) return tiles_moments<Second::kNone, scalar_t, acc_t>(slice);
    const bool alike = slice.param_dtype == slice.grad_dtype &&
                       (second == Second::kParams || slice.anchor_dtype == slice.grad_dtype);
    return visit_params(second, [&](auto given) {
      if (alike) return tiles_moments<given.value, scalar_t, scalar_t>(slice);
      return tiles_moments<given.value, scalar_t, acc_t>(slice);
    });
  });
}
