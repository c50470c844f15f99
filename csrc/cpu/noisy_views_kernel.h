// Two noisy views of one stretch of a tensor; no include guard, see foreach_simd.h.
#include "cpu/simd/noise_kernel.h"
#include "cpu/simd/squared_difference.h"

template <typename scalar_t>
inline void write_view(const scalar_t* x, const float* normals, acc_type<scalar_t> sigma, int64_t n,
                       scalar_t* view) {
  constexpr int kWidth = lanes_of<scalar_t>;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(view + i, multiply_add(splat(sigma), load_as(normals + i, sigma), load(x + i)));
  }
  if (i == n) return;
  // A source's buffer goes on for more than a vector.
  const auto z = load_as(normals + i, sigma);
  store_first(view + i, n - i, multiply_add(splat(sigma), z, load_first(x + i, n - i, 0)));
}

// Writes the views tile by tile, while x is in L1; returns the sum of their squared differences.
template <typename scalar_t>
inline double tiles_views(const ViewsSlice& slice) {
  constexpr int64_t kSpan = NormalSource::kSpan;
  const auto sigma = static_cast<acc_type<scalar_t>>(slice.sigma);
  NormalSource sources[2] = {{slice.noise_keys[0], slice.noise_offsets[0] + slice.begin},
                             {slice.noise_keys[1], slice.noise_offsets[1] + slice.begin}};
  double sum = 0;
  int64_t n;
  for (int64_t at = slice.begin; at < slice.end; at += n) {
    n = std::min(NormalSource::kTile, slice.end - at);
    for (int k = 0; k < 2; ++k) n = std::min(n, kSpan - (slice.noise_offsets[k] + at) % kSpan);
    const scalar_t* x = static_cast<const scalar_t*>(slice.x) + at;
    scalar_t* views[2];
    for (int k = 0; k < 2; ++k) {
      views[k] = static_cast<scalar_t*>(slice.views[k]) + at;
      write_view(x, sources[k].draw(slice.noise_offsets[k] + at, n, x), sigma, n, views[k]);
    }
    // The difference is of the views as they are stored, rounded to their type.
    sum += squared_difference(views[0], views[1], n);
  }
  return sum;
}

inline double write_views(const ViewsSlice& slice) {
  return visit_dtype(slice.dtype, [&](auto* type) {
    return tiles_views<std::remove_pointer_t<decltype(type)>>(slice);
  });
}
