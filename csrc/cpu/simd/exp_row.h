// Exponentials of a row whose classes adjoin in memory; no include guard, see foreach_simd.h.
// Include exp.h and long_sum.h before.

// The others become 0.
inline F32 first_lanes(F32 x, int64_t n) {
  return lane_index() < static_cast<int32_t>(std::min<int64_t>(n, kLanes)) ? x : F32{};
}
inline F64 first_lanes(F64 x, int64_t n) {
  for (int i = 0; i < lanes_of<double>; ++i) x[i] = i < n ? x[i] : 0.0;
  return x;
}

// The largest logit; NaN may be passed over, for the exponentials pass it on.
template <typename scalar_t>
inline float row_max(const scalar_t* x, int64_t n) {
  F32 vmax = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vmax = maximum(load(x + i), vmax);
  float max = vmax[0];
  for (int lane = 1; lane < kLanes; ++lane) max = std::max(max, vmax[lane]);
  for (; i < n; ++i) max = std::max(max, Element<scalar_t>::widen(x[i]));
  return max;
}

// sum of e^(x - max); kStore keeps the terms in `terms`, which has room for a vector more.
template <bool kStore, typename scalar_t>
inline float exp_row(const scalar_t* x, int64_t n, float max, float* terms) {
  LongSum<F32> sum;
  int64_t i = 0;
  const auto add_to = [&](int64_t end) {
    for (; i + kLanes <= end; i += kLanes) {
      const F32 term = exp_nonpositive(load(x + i) - max);
      if constexpr (kStore) store(terms + i, term);
      sum.add(term);
    }
  };
  for (int64_t end = kRun * kLanes; end < n; end += kRun * kLanes) {
    add_to(end);
    sum.end_run();
  }
  add_to(n);
  if (i < n && n >= kLanes) {
    // The last full vector, of which the first lanes are in the sum already.
    const int64_t at = n - kLanes;
    const F32 term = exp_nonpositive(load(x + at) - max);
    if constexpr (kStore) store(terms + at, term);
    sum.add(lane_index() < static_cast<int32_t>(i - at) ? F32{} : term);
  } else if (i < n) {
    const float nothing = -std::numeric_limits<float>::infinity();
    const F32 term = exp_nonpositive(load_first(x, n, nothing) - max);
    if constexpr (kStore) store(terms, term);
    // The other lanes are 0, and each addition waits for the one before.
    double few = 0;
    for (int64_t lane = 0; lane < n; ++lane) few += term[lane];
    return static_cast<float>(few);
  }
  return static_cast<float>(sum.total());
}

inline double row_max(const double* x, int64_t n) {
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) max = std::max(max, x[i]);
  return max;
}

template <bool kStore>
inline double exp_row(const double* x, int64_t n, double max, double* terms) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double term = std::exp(x[i] - max);
    if constexpr (kStore) terms[i] = term;
    sum += term;
  }
  return sum;
}
