// Tiles of one element type read as another; no include guard, see foreach_simd.h.

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
