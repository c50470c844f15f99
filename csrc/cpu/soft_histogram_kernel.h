// Shares samples out between neighbouring bins; no include guard, see foreach_simd.h.

// Samples whose places are found before they are used; whole vectors at every level.
constexpr int64_t kPlaces = 512;

template <typename scalar_t>
inline void find_places(const SoftAxis& axis, int64_t begin, int64_t n, int64_t bins,
                        acc_type<scalar_t>* places) {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* x = static_cast<const scalar_t*>(axis.values) + begin;
  const auto low = splat(static_cast<acc_t>(axis.low));
  const auto per_unit = splat(static_cast<acc_t>(axis.per_unit));
  const auto last = splat(static_cast<acc_t>(bins - 1));
  for (int64_t i = 0; i < n; i += lanes_of<scalar_t>) {
    const int64_t rest = n - i;
    const auto values = rest >= lanes_of<scalar_t> ? load(x + i) : load_first(x + i, rest, 0);
    auto t = (values - low) * per_unit;
    // Both keep NaN.
    t = t < acc_t(0) ? decltype(t){} : t;
    t = t > last ? last : t;
    store(places + i, t);
  }
}

// The lower of a place's two bins; NaN, which has none, is given the first.
template <typename acc_t>
inline int32_t lower_bin(acc_t place, int32_t most) {
  return place >= 0 ? std::min(static_cast<int32_t>(place), most) : 0;
}

// Puts samples that do not count, which may hold anything, in the first bin.
template <typename acc_t>
inline void place_missing(const bool* present, int64_t n, acc_t* places) {
  for (int64_t k = 0; k < n; ++k) places[k] = present[k] ? places[k] : acc_t(0);
}

// Calls f(first sample, number of them, places of x, places of y), a few samples at a time.
template <typename scalar_t, typename F>
inline void for_each_places(const SoftSamples& samples, const F& f) {
  acc_type<scalar_t> x[kPlaces], y[kPlaces];
  for (int64_t begin = samples.begin; begin < samples.end; begin += kPlaces) {
    const int64_t n = std::min(kPlaces, samples.end - begin);
    find_places<scalar_t>(samples.x, begin, n, samples.bins, x);
    find_places<scalar_t>(samples.y, begin, n, samples.bins, y);
    if (samples.present != nullptr) {
      place_missing(samples.present + begin, n, x);
      place_missing(samples.present + begin, n, y);
    }
    f(begin, n, x, y);
  }
}

template <typename scalar_t, bool kMasked>
inline bool add_samples_of(const SoftSamples& samples, double* cells) {
  using acc_t = acc_type<scalar_t>;
  const int32_t most = static_cast<int32_t>(samples.bins - 2);
  bool placed = true;
  for_each_places<scalar_t>(samples, [&](int64_t begin, int64_t n, const acc_t* x, const acc_t* y) {
    for (int64_t k = 0; k < n; ++k) {
      const int32_t i = lower_bin(x[k], most), j = lower_bin(y[k], most);
      const acc_t f = x[k] - i, g = y[k] - j;
      double* upper = cells + i * samples.bins + j;
      double* lower = upper + samples.bins;
      acc_t left = 1 - g, right = g;
      if constexpr (kMasked) {
        // A sample that does not count has 0 for both.
        const acc_t share = samples.present[begin + k] ? acc_t(1) : acc_t(0);
        left *= share;
        right *= share;
      }
      upper[0] += (1 - f) * left;
      upper[1] += (1 - f) * right;
      lower[0] += f * left;
      lower[1] += f * right;
      placed &= f == f && g == g;
    }
  });
  return placed;
}

// Adds to cells [bins, bins]; returns whether every sample had a place.
inline bool add_samples(const SoftSamples& samples, double* cells) {
  return visit_dtype(samples.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    return samples.present == nullptr ? add_samples_of<scalar_t, false>(samples, cells)
                                      : add_samples_of<scalar_t, true>(samples, cells);
  });
}

template <typename scalar_t>
inline void store_scaled(const acc_type<scalar_t>* x, int64_t n, double factor, scalar_t* out) {
  for (int64_t i = 0; i < n; i += lanes_of<scalar_t>) {
    const auto scaled = load(x + i) * static_cast<acc_type<scalar_t>>(factor);
    if (n - i >= lanes_of<scalar_t>) {
      store(out + i, scaled);
    } else {
      store_first(out + i, n - i, scaled);
    }
  }
}

template <typename scalar_t, bool kMasked>
inline SoftRangeSums write_gradients_of(const SoftSamples& samples, const SoftGrads& grads) {
  using acc_t = acc_type<scalar_t>;
  const int32_t most = static_cast<int32_t>(samples.bins - 2);
  const acc_t last = static_cast<acc_t>(samples.bins - 1);
  const acc_t* grad = static_cast<const acc_t*>(grads.grad);
  SoftRangeSums sums;
  for_each_places<scalar_t>(samples, [&](int64_t begin, int64_t n, acc_t* x, acc_t* y) {
    for (int64_t k = 0; k < n; ++k) {
      const int32_t i = lower_bin(x[k], most), j = lower_bin(y[k], most);
      const acc_t f = x[k] - i, g = y[k] - j;
      const acc_t* upper = grad + i * samples.bins + j;
      const acc_t* lower = upper + samples.bins;
      acc_t by_f = (1 - g) * (lower[0] - upper[0]) + g * (lower[1] - upper[1]);
      acc_t by_g = (1 - f) * (upper[1] - upper[0]) + f * (lower[1] - lower[0]);
      if constexpr (kMasked) {
        const bool counts = samples.present[begin + k];
        by_f = counts ? by_f : acc_t(0);
        by_g = counts ? by_g : acc_t(0);
      }
      sums.x_low += by_f * (x[k] - last);
      sums.x_high += by_f * x[k];
      sums.y_low += by_g * (y[k] - last);
      sums.y_high += by_g * y[k];
      x[k] = by_f;
      y[k] = by_g;
    }
    // Only the slopes of the places are needed now.
    scalar_t* grad_x = static_cast<scalar_t*>(grads.grad_x) + begin;
    scalar_t* grad_y = static_cast<scalar_t*>(grads.grad_y) + begin;
    store_scaled(x, n, samples.x.per_unit, grad_x);
    store_scaled(y, n, samples.y.per_unit, grad_y);
    if constexpr (kMasked) {
      // A problem in which no sample counts has no range: 0 times its NaN is not 0.
      for (int64_t k = 0; k < n; ++k) {
        if (samples.present[begin + k]) continue;
        grad_x[k] = scalar_t{};
        grad_y[k] = scalar_t{};
      }
    }
  });
  return sums;
}

inline SoftRangeSums write_gradients(const SoftSamples& samples, const SoftGrads& grads) {
  return visit_dtype(samples.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    return samples.present == nullptr ? write_gradients_of<scalar_t, false>(samples, grads)
                                      : write_gradients_of<scalar_t, true>(samples, grads);
  });
}
