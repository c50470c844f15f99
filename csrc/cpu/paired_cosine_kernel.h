// Cosines of the rows of two features; no include guard, see foreach_simd.h.

// Few enough elements to sum in the accumulator's own precision.
constexpr int64_t kCosineTile = 4096;

// The norm at which torch.nn.functional.normalize stops dividing.
constexpr double kMinNorm = 1e-12;

// <a, b>, <a, a> and <b, b>.
struct RowProducts {
  double ab = 0;
  double aa = 0;
  double bb = 0;
};

template <typename scalar_t>
inline void add_products(const scalar_t* a, const scalar_t* b, int64_t n, RowProducts* sums) {
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kUnroll = 4;
  vec_t ab[kUnroll]{}, aa[kUnroll]{}, bb[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kWidth <= n; i += kUnroll * kWidth) {
    MMFUSE_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const vec_t x = load(a + i + u * kWidth);
      const vec_t y = load(b + i + u * kWidth);
      ab[u] = multiply_add(x, y, ab[u]);
      aa[u] = multiply_add(x, x, aa[u]);
      bb[u] = multiply_add(y, y, bb[u]);
    }
  }
  for (; i < n; i += kWidth) {
    const bool full = n - i >= kWidth;
    const vec_t x = full ? load(a + i) : load_first(a + i, n - i, 0);
    const vec_t y = full ? load(b + i) : load_first(b + i, n - i, 0);
    ab[0] = multiply_add(x, y, ab[0]);
    aa[0] = multiply_add(x, x, aa[0]);
    bb[0] = multiply_add(y, y, bb[0]);
  }
  sums->ab += sum_lanes((ab[0] + ab[1]) + (ab[2] + ab[3]));
  sums->aa += sum_lanes((aa[0] + aa[1]) + (aa[2] + aa[3]));
  sums->bb += sum_lanes((bb[0] + bb[1]) + (bb[2] + bb[3]));
}

struct RowCosine {
  double cosine;
  double norm_a;
  double norm_b;
};

template <typename scalar_t>
inline RowCosine row_cosine(const scalar_t* a, const scalar_t* b, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  RowProducts sums;
  for (int64_t i = 0; i < n; i += kCosineTile) {
    add_products(a + i, b + i, std::min(kCosineTile, n - i), &sums);
  }
  // Rounded, so that the accumulator's range ends at the same place at every vector width.
  const double norm_a = std::sqrt(static_cast<double>(static_cast<acc_t>(sums.aa)));
  const double norm_b = std::sqrt(static_cast<double>(static_cast<acc_t>(sums.bb)));
  // NaN must stay, hence the order of the operands.
  const double norms = std::max(norm_a, kMinNorm) * std::max(norm_b, kMinNorm);
  return {static_cast<acc_t>(sums.ab) / norms, norm_a, norm_b};
}

// The sum over the rows.
inline double cosine_rows(const FeatureRows& rows) {
  return visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    double sum = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      sum += row_cosine(static_cast<const scalar_t*>(rows.a) + i * rows.width,
                        static_cast<const scalar_t*>(rows.b) + i * rows.width, rows.width)
                 .cosine;
    }
    return sum;
  });
}

// Both gradients of grad * cosine(a, b).
template <typename scalar_t>
inline void cosine_grad_row(const scalar_t* a, const scalar_t* b, int64_t n, double grad,
                            scalar_t* grad_a, scalar_t* grad_b) {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  const RowCosine row = row_cosine(a, b, n);
  const double norm_a = std::max(row.norm_a, kMinNorm), norm_b = std::max(row.norm_b, kMinNorm);
  // One factor after the other: 1 / norm^2 would leave the accumulator's range.
  const vec_t unit_a = splat(static_cast<acc_t>(1 / norm_a));
  const vec_t unit_b = splat(static_cast<acc_t>(1 / norm_b));
  const vec_t slope_a = splat(static_cast<acc_t>(grad / norm_a));
  const vec_t slope_b = splat(static_cast<acc_t>(grad / norm_b));
  const vec_t minus_cosine = splat(static_cast<acc_t>(-row.cosine));
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t rest = n - i;
    const bool full = rest >= kWidth;
    const vec_t x = (full ? load(a + i) : load_first(a + i, rest, 0)) * unit_a;
    const vec_t y = (full ? load(b + i) : load_first(b + i, rest, 0)) * unit_b;
    const vec_t dx = multiply_add(minus_cosine, x, y) * slope_a;
    const vec_t dy = multiply_add(minus_cosine, y, x) * slope_b;
    if (full) {
      store(grad_a + i, dx);
      store(grad_b + i, dy);
    } else {
      store_first(grad_a + i, rest, dx);
      store_first(grad_b + i, rest, dy);
    }
  }
  if (n == 0) return;  // there is no memory, and memset must not be given null
  if (row.norm_a <= kMinNorm) std::memset(grad_a, 0, n * sizeof(scalar_t));
  if (row.norm_b <= kMinNorm) std::memset(grad_b, 0, n * sizeof(scalar_t));
}

inline void cosine_grad_rows(const FeatureRows& rows, const CosineGrads& grads) {
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t at = i * rows.width;
      cosine_grad_row(static_cast<const scalar_t*>(rows.a) + at,
                      static_cast<const scalar_t*>(rows.b) + at, rows.width, grads.grad,
                      static_cast<scalar_t*>(grads.grad_a) + at,
                      static_cast<scalar_t*>(grads.grad_b) + at);
    }
  });
}
