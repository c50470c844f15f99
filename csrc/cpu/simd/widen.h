// Tiles of one element type read as another, and the displacement of two of them; no include guard,
// see foreach_simd.h.

template <typename to_t, typename from_t>
inline void convert(const from_t* from, int64_t n, to_t* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_type<from_t>, to_t>) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < n; ++i) to[i] = static_cast<to_t>(Element<from_t>::widen(from[i]));
}

// The `n` elements of `data` from `begin` on: in place if they are of type to_t, else converted
// into `buffer`, for which to_t is float or double.
template <typename to_t>
inline const to_t* tile_as(const void* data, DType dtype, int64_t begin, int64_t n, to_t* buffer) {
  if (dtype == Element<to_t>::kDType) return static_cast<const to_t*>(data) + begin;
  if constexpr (std::is_same_v<to_t, acc_type<to_t>>) {
    visit_dtype(dtype, [&](auto* type) {
      convert(static_cast<decltype(type)>(const_cast<void*>(data)) + begin, n, buffer);
    });
    return buffer;
  }
  return nullptr;
}

// The lists beside a call's gradients: none, parameters w, or also their anchors w0.
enum class Second { kNone, kParams, kBoth };

inline Second second_of(const void* param, const void* anchor) {
  if (param == nullptr) return Second::kNone;
  return anchor == nullptr ? Second::kParams : Second::kBoth;
}

// Calls f with `second`, which is not kNone, as a compile-time constant.
template <typename F>
inline auto visit_params(Second second, const F& f) {
  if (second == Second::kBoth) return f(std::integral_constant<Second, Second::kBoth>());
  return f(std::integral_constant<Second, Second::kParams>());
}

// A vector of w - w0, or of w where there are no anchors.
template <Second kSecond, typename param_t>
inline vec_type<param_t> load_displacement(const param_t* param, const param_t* anchor, int64_t i) {
  if constexpr (kSecond == Second::kBoth) {
    return load(param + i) - load(anchor + i);
  } else {
    return load(param + i);
  }
}
