// Ends of a row, and entropies of a soft histogram; no include guard, see foreach_simd.h.

#include "cpu/simd/log.h"

// f(a pointer of the values' type).
template <typename F>
inline auto visit_wide(DType dtype, const F& f) {
  return dtype == DType::kFloat64 ? f(static_cast<const double*>(nullptr))
                                  : f(static_cast<const float*>(nullptr));
}

template <typename acc_t>
inline ValueEnds ends_of(const acc_t* x, int64_t n) {
  auto low = splat(x[0]), high = low, zero = splat(acc_t(0));
  for (int64_t i = 0; i < n; i += lanes_of<acc_t>) {
    const auto v = n - i >= lanes_of<acc_t> ? load(x + i) : load_first(x + i, n - i, x[0]);
    low = v < low ? v : low;
    high = v > high ? v : high;
    // NaN from the first NaN or infinity on.
    zero = multiply_add(v, splat(acc_t(0)), zero);
  }
  acc_t lowest = x[0], highest = x[0], sum = 0;
  for (int lane = 0; lane < lanes_of<acc_t>; ++lane) {
    lowest = std::min(lowest, static_cast<acc_t>(low[lane]));
    highest = std::max(highest, static_cast<acc_t>(high[lane]));
    sum += zero[lane];
  }
  // An infinity or a NaN leaves no range to speak of.
  return {lowest + static_cast<double>(sum), highest + static_cast<double>(sum)};
}

// The ends of the values that count; the others are taken for the first of these.
template <typename acc_t>
inline ValueEnds ends_of_present(const acc_t* x, const bool* present, int64_t n) {
  constexpr int64_t kTogether = 512;
  ValueEnds ends{std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
  const bool* one = std::find(present, present + n, true);
  if (one == present + n) return ends;
  const acc_t first = x[one - present];
  double broken = 0;
  for (int64_t begin = 0; begin < n; begin += kTogether) {
    acc_t values[kTogether];
    const int64_t count = std::min(kTogether, n - begin);
    for (int64_t i = 0; i < count; ++i) values[i] = present[begin + i] ? x[begin + i] : first;
    const ValueEnds found = ends_of(values, count);
    ends = {std::min(ends.low, found.low), std::max(ends.high, found.high)};
    broken += 0 * found.low;
  }
  return {ends.low + broken, ends.high + broken};
}

inline ValueEnds ends_of_values(const SoftValues& row) {
  return visit_wide(row.dtype, [&](auto* type) -> ValueEnds {
    using acc_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const acc_t* x = static_cast<const acc_t*>(row.values) + row.begin;
    const int64_t n = row.end - row.begin;
    return row.present == nullptr ? ends_of(x, n) : ends_of_present(x, row.present + row.begin, n);
  });
}

inline EndCounts count_ends(const SoftValues& row, const ValueEnds& ends) {
  return visit_wide(row.dtype, [&](auto* type) -> EndCounts {
    using acc_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const acc_t* x = static_cast<const acc_t*>(row.values);
    const acc_t low = static_cast<acc_t>(ends.low), high = static_cast<acc_t>(ends.high);
    int32_t at_low = 0, at_high = 0;
    for (int64_t i = row.begin; row.present == nullptr && i < row.end; ++i) {
      at_low += x[i] == low;
      at_high += x[i] == high;
    }
    for (int64_t i = row.begin; row.present != nullptr && i < row.end; ++i) {
      at_low += row.present[i] && x[i] == low;
      at_high += row.present[i] && x[i] == high;
    }
    return {at_low, at_high};
  });
}

// Adds each share to the gradients of the values that are at that end.
inline void add_to_ends(const SoftValues& row, const ValueEnds& ends, const ValueEnds& shares,
                        void* grad) {
  visit_wide(row.dtype, [&](auto* type) {
    using acc_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const acc_t* x = static_cast<const acc_t*>(row.values);
    acc_t* out = static_cast<acc_t*>(grad);
    const acc_t low = static_cast<acc_t>(ends.low), high = static_cast<acc_t>(ends.high);
    const acc_t to_low = static_cast<acc_t>(shares.low), to_high = static_cast<acc_t>(shares.high);
    for (int64_t i = row.begin; i < row.end; ++i) {
      if (row.present != nullptr && !row.present[i]) continue;
      if (x[i] == low) out[i] += to_low;
      if (x[i] == high) out[i] += to_high;
    }
    return 0;
  });
}

// Sums of a table's rows and of its columns, in whole vectors.
template <typename acc_t>
struct SoftMargins {
  acc_t rows[kMaxSoftBins];
  acc_t columns[kMaxSoftBins];

  SoftMargins(const acc_t* weights, int64_t bins) {
    double column_sums[kMaxSoftBins] = {};
    for (int64_t i = 0; i < bins; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < bins; ++j) {
        sum += weights[i * bins + j];
        column_sums[j] += weights[i * bins + j];
      }
      rows[i] = static_cast<acc_t>(sum);
    }
    for (int64_t j = 0; j < bins; ++j) columns[j] = static_cast<acc_t>(column_sums[j]);
  }
};

// Calls f(i, p, log max(p, the smallest normal number), elements left) for vectors of the shares.
template <typename acc_t, typename F>
inline void for_each_log(const acc_t* counts, int64_t n, double samples, const F& f) {
  const auto total = splat(static_cast<acc_t>(samples));
  const auto least = splat(std::numeric_limits<acc_t>::min());
  for (int64_t i = 0; i < n; i += lanes_of<acc_t>) {
    const int64_t rest = n - i;
    const auto c = rest >= lanes_of<acc_t> ? load(counts + i) : load_first(counts + i, rest, 0);
    const auto p = c / total;
    f(i, p, log_of_normal(p < least ? least : p), rest);
  }
}

// Terms that are summed in the accumulator's own precision.
constexpr int64_t kEntropyRun = 256;

template <typename acc_t>
inline double entropy_of(const acc_t* counts, int64_t n, double samples) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kEntropyRun) {
    auto sum = splat(acc_t(0));
    for_each_log(counts + i, std::min(kEntropyRun, n - i), samples,
                 [&](int64_t, auto p, auto log_p, int64_t) { sum -= p * log_p; });
    total += sum_lanes(sum);
  }
  return total;
}

// H(x), H(y) and H(x, y).
inline void table_entropies(const SoftTable& table, double* out) {
  visit_wide(table.dtype, [&](auto* type) {
    using acc_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const acc_t* weights = static_cast<const acc_t*>(table.weights);
    const SoftMargins<acc_t> margins(weights, table.bins);
    out[0] = entropy_of(margins.rows, table.bins, table.samples);
    out[1] = entropy_of(margins.columns, table.bins, table.samples);
    out[2] = entropy_of(weights, table.bins * table.bins, table.samples);
    return 0;
  });
}

// scale times the slopes of -p log max(p, least).
template <typename acc_t>
inline void write_slopes(const acc_t* counts, int64_t n, double samples, double scale, acc_t* out) {
  const auto least = splat(std::numeric_limits<acc_t>::min());
  const auto factor = splat(static_cast<acc_t>(-scale));
  for_each_log(counts, n, samples, [&](int64_t i, auto p, auto log_p, int64_t rest) {
    const auto slope = factor * (log_p + (p < least ? splat(acc_t(0)) : splat(acc_t(1))));
    if (rest >= lanes_of<acc_t>) {
      store(out + i, slope);
    } else {
      store_first(out + i, rest, slope);
    }
  });
}

// The gradient of a table from those of its three entropies.
inline void table_slopes(const SoftTable& table, const double* grad, void* slopes) {
  visit_wide(table.dtype, [&](auto* type) {
    using acc_t = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const acc_t* weights = static_cast<const acc_t*>(table.weights);
    acc_t* out = static_cast<acc_t*>(slopes);
    const int64_t bins = table.bins;
    const double n = table.samples;
    const SoftMargins<acc_t> margins(weights, bins);
    acc_t rows[kMaxSoftBins], columns[kMaxSoftBins];
    write_slopes(margins.rows, bins, n, grad[0] / n, rows);
    write_slopes(margins.columns, bins, n, grad[1] / n, columns);
    write_slopes(weights, bins * bins, n, grad[2] / n, out);
    for (int64_t i = 0; i < bins; ++i) {
      for (int64_t j = 0; j < bins; ++j) out[i * bins + j] += rows[i] + columns[j];
    }
    return 0;
  });
}
