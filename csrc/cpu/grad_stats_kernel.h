// Moments of one stretch of a gradient; no include guard, see foreach_simd.h.
#include "cpu/simd/widen.h"

// Few enough elements to stay in L1 with both buffers, and to sum in single precision.
constexpr int64_t kStatsTile = 4096;
constexpr int64_t kPilot = 64;

// One pass over x - shift. With the mean of kPilot of the elements as the shift, the squares sum to
// at most 1 + n / kPilot times m2, whatever the data: so much is lost to cancellation, no more.
template <Second kSecond, typename scalar_t, typename param_t>
inline Moments<double> tile_moments(const scalar_t* grad, const param_t* param,
                                    const param_t* anchor, int64_t n) {
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = kSecond == Second::kNone ? 4 : 2;
  acc_type<scalar_t> shift = Element<scalar_t>::widen(grad[0]);
  if (n >= kPilot) {
    vec_t pilot{};
    for (int64_t i = 0; i < kPilot; i += kWidth) pilot += load(grad + i);
    shift = static_cast<acc_type<scalar_t>>(sum_lanes(pilot) / kPilot);
  }
  vec_t sum[kUnroll]{}, squares[kUnroll]{}, dot[kUnroll]{}, disp_sq[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
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
  double total = 0, total_squares = 0;
  Moments<double> out;
  for (int u = 0; u < kUnroll; ++u) {
    total += sum_lanes(sum[u]);
    total_squares += sum_lanes(squares[u]);
    out.dot += sum_lanes(dot[u]);
    out.disp_sq += sum_lanes(disp_sq[u]);
  }
  for (; i < n; ++i) {
    const double g = Element<scalar_t>::widen(grad[i]);
    const double d = g - shift;
    total += d;
    total_squares += d * d;
    if constexpr (kSecond != Second::kNone) {
      double moved = Element<param_t>::widen(param[i]);
      if constexpr (kSecond == Second::kBoth) moved -= Element<param_t>::widen(anchor[i]);
      out.dot += moved * g;
      out.disp_sq += moved * moved;
    }
  }
  out.n = n;
  out.mean = shift + total / n;
  // Rounding can push the difference below zero; NaN must stay, hence the order of the operands.
  out.m2 = std::max(total_squares - total * (total / n), 0.0);
  return out;
}

template <Second kSecond, typename scalar_t, typename param_t>
inline Moments<double> tiles_moments(const StatsSlice& slice) {
  param_t param_buffer[kStatsTile], anchor_buffer[kStatsTile];
  const param_t* param = nullptr;
  const param_t* anchor = nullptr;
  Moments<double> out;
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
    out = merge_moments(out, tile_moments<kSecond>(grad, param, anchor, n));
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
