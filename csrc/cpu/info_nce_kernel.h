// Log-sum-exp of rows and columns at once, and slopes; no include guard, see foreach_simd.h.

#include "cpu/simd/exp.h"

template <typename acc_t>
constexpr acc_t kNothing = -std::numeric_limits<acc_t>::infinity();

inline F64 maximum(F64 a, F64 b) { return a > b ? a : b; }

// Subtracted in the exponent: finite, so that infinities have no difference.
template <typename vec_t>
inline vec_t shift_of(vec_t max) {
  using acc_t = std::remove_reference_t<decltype(max[0])>;
  const vec_t most = splat(std::numeric_limits<acc_t>::max());
  max = max > most ? most : max;
  return max < -most ? -most : max;
}

// e^(x - shift), 1 where x is infinite; NaN stays.
template <typename vec_t>
inline vec_t exp_below(vec_t x, vec_t shift) {
  return exp_nonpositive(-maximum(vec_t{}, shift - x));
}

template <typename acc_t>
inline vec_type<acc_t> load_or_nothing(const acc_t* p, int64_t rest) {
  return rest >= lanes_of<acc_t> ? load(p) : load_first(p, rest, kNothing<acc_t>);
}

template <typename acc_t>
inline acc_t largest(const acc_t* x, int64_t n) {
  auto max = splat(kNothing<acc_t>);
  for (int64_t c = 0; c < n; c += lanes_of<acc_t>)
    max = maximum(load_or_nothing(x + c, n - c), max);
  acc_t most = max[0];
  for (int lane = 1; lane < lanes_of<acc_t>; ++lane) most = std::max(most, max[lane]);
  return most;
}

// The columns of a stripe, in whole vectors.
template <typename acc_t>
struct StripeColumns {
  acc_t max[kStripeColumns];
  acc_t shift[kStripeColumns];
  acc_t rescale[kStripeColumns];  // what an old sum counts for under the new maximum
  acc_t sum[kStripeColumns];      // of the rows of one block
};

template <typename acc_t>
inline void start_block(const acc_t* x, int64_t stride, int64_t rows, int64_t n,
                        StripeColumns<acc_t>* columns) {
  for (int64_t c = 0; c < n; c += lanes_of<acc_t>) {
    const auto before = load(columns->max + c);
    auto max = before;
    for (int64_t r = 0; r < rows; ++r) {
      max = maximum(load_or_nothing(x + r * stride + c, n - c), max);
    }
    store(columns->max + c, max);
    store(columns->shift + c, shift_of(max));
    store(columns->rescale + c, exp_below(shift_of(before), shift_of(max)));
    store(columns->sum + c, vec_type<acc_t>{});
  }
}

// Adds one row to the columns' sums and returns its own.
template <typename acc_t>
inline double add_row(const acc_t* x, int64_t n, acc_t max, StripeColumns<acc_t>* columns) {
  const auto shift = shift_of(splat(max));
  vec_type<acc_t> sum{};
  for (int64_t c = 0; c < n; c += lanes_of<acc_t>) {
    const auto s = load_or_nothing(x + c, n - c);
    sum += exp_below(s, shift);
    store(columns->sum + c, load(columns->sum + c) + exp_below(s, load(columns->shift + c)));
  }
  return sum_lanes(sum);
}

// One stripe of columns: the columns' sums go on from what they were, the rows' are of this alone.
inline void add_stripe(const SimilarityBlock& block, const RunningSums& row_sums,
                       const RunningSums& column_sums) {
  const auto run = [&](auto* values) {
    using acc_t = std::remove_pointer_t<decltype(values)>;
    const int64_t n = block.columns;
    StripeColumns<acc_t> columns;
    std::fill_n(columns.max, kStripeColumns, kNothing<acc_t>);
    for (int64_t c = 0; c < n; ++c) columns.max[c] = static_cast<acc_t>(column_sums.max[c]);
    for (int64_t first = 0; first < block.rows; first += kBlockRows) {
      const int64_t last = std::min(first + kBlockRows, block.rows);
      const acc_t* x = values + first * block.stride;
      start_block(x, block.stride, last - first, n, &columns);
      for (int64_t r = first; r < last; ++r, x += block.stride) {
        const acc_t max = largest(x, n);
        row_sums.max[r] = max;
        row_sums.sum[r] = add_row(x, n, max, &columns);
      }
      for (int64_t c = 0; c < n; ++c) {
        column_sums.sum[c] = column_sums.sum[c] * columns.rescale[c] + columns.sum[c];
      }
    }
    for (int64_t c = 0; c < n; ++c) column_sums.max[c] = columns.max[c];
  };
  if (block.dtype == DType::kFloat64) {
    run(static_cast<double*>(block.values));
  } else {
    run(static_cast<float*>(block.values));
  }
}

// -(e^(s - row) + e^(s - column)) / 2
template <typename vec_t>
inline vec_t minus_softmaxes(vec_t s, vec_t row, vec_t column) {
  using acc_t = std::remove_reference_t<decltype(s[0])>;
  return (exp_nonpositive(s - row) + exp_nonpositive(s - column)) * acc_t(-0.5);
}

// Returns sum of slope * s, without the scale.
template <typename acc_t>
inline double slope_row(acc_t* x, int64_t n, acc_t row, const acc_t* columns, int64_t diagonal,
                        acc_t scale) {
  constexpr int kWidth = lanes_of<acc_t>;
  const auto row_sum = splat(row);
  const bool has_diagonal = 0 <= diagonal && diagonal < n;
  const acc_t own = has_diagonal ? x[diagonal] : acc_t(0);
  vec_type<acc_t> product{};
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t rest = n - c;
    const bool full = rest >= kWidth;
    const auto s = full ? load(x + c) : load_first(x + c, rest, 0);
    const auto column = full ? load(columns + c) : load_first(columns + c, rest, 0);
    const auto slope = minus_softmaxes(s, row_sum, column);
    if (full) {
      product = multiply_add(slope, s, product);
      store(x + c, slope * scale);
    } else {
      // The lanes past the end may hold anything.
      for (int64_t lane = 0; lane < rest; ++lane) product[lane] += slope[lane] * s[lane];
      store_first(x + c, rest, slope * scale);
    }
  }
  if (has_diagonal) {
    const auto softmaxes = minus_softmaxes(splat(own), row_sum, splat(columns[diagonal]));
    x[diagonal] = (1 + softmaxes[0]) * scale;
  }
  return sum_lanes(product) + own;
}

// Turns similarities into slopes; returns the sum of slope * similarity, without the scale.
inline double slope_rows(const SimilarityBlock& block, const SlopeParams& params) {
  const auto run = [&](auto* values) {
    using acc_t = std::remove_pointer_t<decltype(values)>;
    double sum = 0;
    for (int64_t r = 0; r < block.rows; ++r) {
      sum += slope_row(values + r * block.stride, block.columns,
                       static_cast<const acc_t*>(params.rows)[r],
                       static_cast<const acc_t*>(params.columns), params.diagonal + r,
                       static_cast<acc_t>(params.scale));
    }
    return sum;
  };
  return block.dtype == DType::kFloat64 ? run(static_cast<double*>(block.values))
                                        : run(static_cast<float*>(block.values));
}
