// Entropies of a histogram's margins.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

namespace mmfuse::cpu {

constexpr int kMaxOrder = 3;
// Cells of all margins together: three planes and three lines of a cube, or two lines of a square.
constexpr int64_t kMarginCells = 3 * 32 * 32 + 3 * 32;

// c ln c; the counts of most cells are small.
inline double c_log_c(int64_t count) {
  static const auto table = [] {
    std::array<double, 1024> values{};
    for (size_t c = 1; c < values.size(); ++c) values[c] = c * std::log(static_cast<double>(c));
    return values;
  }();
  if (count < static_cast<int64_t>(table.size())) return table[count];
  return static_cast<double>(count) * std::log(static_cast<double>(count));
}

inline double entropy(const int64_t* counts, int64_t cells, double total) {
  double sums[4]{};
  int64_t c = 0;
  for (; c + 4 <= cells; c += 4) {
    for (int u = 0; u < 4; ++u) sums[u] += c_log_c(counts[c + u]);
  }
  for (; c < cells; ++c) sums[0] += c_log_c(counts[c]);
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return std::max(0.0, std::log(total) - sum / total);
}

inline int64_t power(int64_t base, int exponent) {
  return exponent == 0 ? 1 : base * power(base, exponent - 1);
}

// Sums an array [outer, bins, inner] over the bins.
inline void sum_bins(const int64_t* in, int64_t outer, int64_t bins, int64_t inner, int64_t* out) {
  if (inner == 1) {
    for (int64_t o = 0; o < outer; ++o) {
      out[o] = std::accumulate(in + o * bins, in + (o + 1) * bins, int64_t{0});
    }
    return;
  }
  std::fill(out, out + outer * inner, 0);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t b = 0; b < bins; ++b, in += inner) {
      for (int64_t i = 0; i < inner; ++i) out[o * inner + i] += in[i];
    }
  }
}

// The entropies of all margins of one histogram of `total` values.
inline void write_entropies(const int64_t* counts, int order, int bins, int64_t total,
                            double* out) {
  const int whole = (1 << order) - 1;
  if (total == 0) {
    std::fill(out, out + whole, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  int64_t buffer[kMarginCells];
  const int64_t* margins[1 << kMaxOrder];
  int64_t* next = buffer;
  margins[whole] = counts;
  for (int mask = whole; mask > 0; --mask) {
    const int kept = __builtin_popcount(mask);
    if (mask != whole) {
      // It is formed from the margin that has one variable more.
      const int added = __builtin_ctz(~mask);
      const int before = __builtin_popcount(mask & ((1 << added) - 1));
      sum_bins(margins[mask | 1 << added], power(bins, before), bins, power(bins, kept - before),
               next);
      margins[mask] = next;
      next += power(bins, kept);
    }
    out[mask - 1] = entropy(margins[mask], power(bins, kept), static_cast<double>(total));
  }
}

}  // namespace mmfuse::cpu
