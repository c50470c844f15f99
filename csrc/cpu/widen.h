// Tiles of one element type read as another; no include guard, see foreach_simd.h.

// `n` elements of `data` from `begin` on, in the type that the gradient is computed in: in place
// where that is their own type, else converted into `buffer`.
template <typename acc_t>
inline const acc_t* tile_as(const void* data, DType dtype, int64_t begin, int64_t n,
                            acc_t* buffer) {
  return visit_dtype(dtype, [&](auto* type) -> const acc_t* {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    const scalar_t* source = static_cast<const scalar_t*>(data) + begin;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return source;
    } else {
      int64_t i = 0;
      if constexpr (std::is_same_v<acc_type<scalar_t>, acc_t>) {
        for (; i + kLanes <= n; i += kLanes) store(buffer + i, load(source + i));
      }
      for (; i < n; ++i) buffer[i] = static_cast<acc_t>(Element<scalar_t>::widen(source[i]));
      return buffer;
    }
  });
}
