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

// Calls f(first sample, number of them, places of x, places of y), a few samples at a time.
template <typename scalar_t, typename F>
inline void for_each_places(const SoftSamples& samples, const F& f) {
  acc_type<scalar_t> x[kPlaces], y[kPlaces];
  for (int64_t begin = samples.begin; begin < samples.end; begin += kPlaces) {
    const int64_t n = std::min(kPlaces, samples.end - begin);
    find_places<scalar_t>(samples.x, begin, n, samples.bins, x);
    find_places<scalar_t>(samples.y, begin, n, samples.bins, y);
    f(begin, n, x, y);
  }
}

// Adds to cells [bins, bins]; returns whether every sample had a place.
inline bool add_samples(const SoftSamples& samples, double* cells) {
  return visit_dtype(samples.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    const int32_t most = static_cast<int32_t>(samples.bins - 2);
    bool placed = true;
    for_each_places<scalar_t>(samples, [&](int64_t, int64_t n, const acc_t* x, const acc_t* y) {
      for (int64_t k = 0; k < n; ++k) {
        const int32_t i = lower_bin(x[k], most), j = lower_bin(y[k], most);
        const acc_t f = x[k] - i, g = y[k] - j;
        double* upper = cells + i * samples.bins + j;
        double* lower = upper + samples.bins;
        upper[0] += (1 - f) * (1 - g);
        upper[1] += (1 - f) * g;
        lower[0] += f * (1 - g);
        lower[1] += f * g;
        placed &= f == f && g == g;
      }
    });
    return placed;
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

inline SoftRangeSums write_gradients(const SoftSamples& samples, const SoftGrads& grads) {
  return visit_dtype(samples.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
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
        const acc_t by_f = (1 - g) * (lower[0] - upper[0]) + g * (lower[1] - upper[1]);
        const acc_t by_g = (1 - f) * (upper[1] - upper[0]) + f * (lower[1] - lower[0]);
        sums.x_low += by_f * (x[k] - last);
        sums.x_high += by_f * x[k];
        sums.y_low += by_g * (y[k] - last);
        sums.y_high += by_g * y[k];
        x[k] = by_f;
        y[k] = by_g;
      }
      // Of the places only their slopes are needed now.
      store_scaled(x, n, samples.x.per_unit, static_cast<scalar_t*>(grads.grad_x) + begin);
      store_scaled(y, n, samples.y.per_unit, static_cast<scalar_t*>(grads.grad_y) + begin);
    });
    return sums;
  });
}
