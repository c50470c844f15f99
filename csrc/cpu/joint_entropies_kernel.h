// Ranges, bins and counts of a few values; no include guard, see foreach_simd.h.
constexpr int kBinUnroll = 4;

// The u-th vector from x + i on; lanes from n on hold `rest`.
template <typename scalar_t>
inline vec_type<scalar_t> load_until(const scalar_t* x, int64_t i, int64_t n,
                                     acc_type<scalar_t> rest) {
  constexpr int kWidth = lanes_of<scalar_t>;
  if (i + kWidth <= n) return load(x + i);
  return i < n ? load_first(x + i, n - i, rest) : splat(rest);
}

template <typename scalar_t>
inline RowRange range_of_values(const scalar_t* x, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int64_t kBlock = kBinUnroll * kWidth;
  const acc_t first = Element<scalar_t>::widen(x[0]);
  vec_t low[kBinUnroll], high[kBinUnroll], zero[kBinUnroll];
  for (int u = 0; u < kBinUnroll; ++u) {
    low[u] = high[u] = splat(first);
    zero[u] = vec_t{};
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    const bool full = i + kBlock <= n;
    MMFUSE_UNROLL for (int u = 0; u < kBinUnroll; ++u) {
      const int64_t at = i + u * kWidth;
      const vec_t v = full ? load(x + at) : load_until(x, at, n, first);
      low[u] = v < low[u] ? v : low[u];
      high[u] = v > high[u] ? v : high[u];
      // 0 only as long as everything is finite.
      zero[u] = multiply_add(v, vec_t{}, zero[u]);
    }
  }
  acc_t lowest = first, highest = first, sum = 0;
  for (int u = 0; u < kBinUnroll; ++u) {
    for (int i = 0; i < kWidth; ++i) {
      lowest = std::min(lowest, static_cast<acc_t>(low[u][i]));
      highest = std::max(highest, static_cast<acc_t>(high[u][i]));
      sum += zero[u][i];
    }
  }
  return {lowest, highest, sum == 0};
}

inline RowRange row_range(const RowSlice& row) {
  return visit_dtype(row.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    return range_of_values(static_cast<const scalar_t*>(row.x) + row.begin, row.end - row.begin);
  });
}

// A vector of as many int32 as F64 has lanes.
using I32Half = int32_t __attribute__((vector_size(kVectorBytes / 2)));

inline I32 lane_integers(I32 x) { return x; }
inline I32Half lane_integers(I64 x) { return __builtin_convertvector(x, I32Half); }
inline I32 truncate(F32 x) { return __builtin_convertvector(x, I32); }
inline I32Half truncate(F64 x) { return __builtin_convertvector(x, I32Half); }
inline F32 to_places(I32 x) { return __builtin_convertvector(x, F32); }
inline F64 to_places(I32Half x) { return __builtin_convertvector(x, F64); }

// The largest i with edges[i] <= x. Either from the nearest edge, or by comparing with every one:
// that is faster for few bins, and right also where the edges are as close as neighbouring numbers.
template <bool kNearest, typename scalar_t>
inline void bins_of_values(const scalar_t* x, int64_t n, const RowBins& row, int32_t* index) {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int64_t kBlock = kBinUnroll * kWidth;
  const acc_t* edges = edges_of(row, acc_t());
  const acc_t low = static_cast<acc_t>(row.low);
  const vec_t lows = splat(low);
  const vec_t step = splat(static_cast<acc_t>(row.step));
  const vec_t inverse_step = splat(static_cast<acc_t>(row.inverse_step));
  // Half a bin on, so that what is cut off leads to the nearest edge.
  const vec_t start = splat(static_cast<acc_t>(0.5 - row.low * row.inverse_step));
  const int bins = row.bins;
  for (int64_t i = 0; i < n; i += kBlock) {
    vec_t v[kBinUnroll];
    const bool full = i + kBlock <= n;
    MMFUSE_UNROLL for (int u = 0; u < kBinUnroll; ++u) {
      const int64_t at = i + u * kWidth;
      v[u] = full ? load(x + at) : load_until(x, at, n, low);
    }
    if constexpr (kNearest) {
      MMFUSE_UNROLL for (int u = 0; u < kBinUnroll; ++u) {
        const auto place = truncate(multiply_add(v[u], inverse_step, start));
        const auto last = decltype(place){} + bins - 1;  // the end of its bin belongs to it
        const auto nearest = place < last ? place : last;
        // The table's edge, formed again: that is quicker than to look it up.
        // The product is rounded before the sum, with which the compiler would contract it.
        const vec_t edge = opaque(to_places(nearest) * step) + lows;
        const auto bin = nearest + lane_integers(v[u] < edge);
        std::memcpy(index + i + u * kWidth, &bin, sizeof bin);
      }
    } else {
      decltype(v[0] < v[0]) minus_bin[kBinUnroll]{};
      for (int e = 1; e < bins; ++e) {
        const vec_t edge = splat(edges[e]);
        MMFUSE_UNROLL for (int u = 0; u < kBinUnroll; ++u) minus_bin[u] += v[u] >= edge;
      }
      MMFUSE_UNROLL for (int u = 0; u < kBinUnroll; ++u) {
        const auto bin = lane_integers(-minus_bin[u]);
        std::memcpy(index + i + u * kWidth, &bin, sizeof bin);
      }
    }
  }
}

// The bins of at most kBinTile values of a row whose bins are valid.
inline void bin_tile(const RowSlice& row, const RowBins& bins, int32_t* index) {
  visit_dtype(row.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    const auto* x = static_cast<const scalar_t*>(row.x) + row.begin;
    if (bins.inverse_step != 0) {
      bins_of_values<true>(x, row.end - row.begin, bins, index);
    } else {
      bins_of_values<false>(x, row.end - row.begin, bins, index);
    }
  });
}

template <int kOrder, typename scalar_t>
inline void count_halves_of(const RowSlice* rows, const RowBins* const* bins, uint32_t* hits) {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  using mask_t = decltype(vec_t{} < vec_t{});
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int kSets = 1 << kOrder;
  const scalar_t* x[kOrder];
  vec_t edge[kOrder];
  for (int k = 0; k < kOrder; ++k) {
    x[k] = static_cast<const scalar_t*>(rows[k].x) + rows[k].begin;
    edge[k] = splat(edges_of(*bins[k], acc_t())[1]);
  }
  const int64_t n = rows[0].end - rows[0].begin;
  // above[s]: minus the number of values in the upper bin of all variables of the set s.
  mask_t above[kSets]{};
  for (int64_t i = 0; i < n; i += kWidth) {
    mask_t in[kSets];
    MMFUSE_UNROLL for (int k = 0; k < kOrder; ++k) {
      // A NaN is in no upper bin.
      const vec_t v = load_until(x[k], i, n, std::numeric_limits<acc_t>::quiet_NaN());
      in[1 << k] = v >= edge[k];
      MMFUSE_UNROLL for (int s = 1; s < 1 << k; ++s) in[s | 1 << k] = in[s] & in[1 << k];
    }
    MMFUSE_UNROLL for (int s = 1; s < kSets; ++s) above[s] += in[s];
  }
  int64_t counts[kSets] = {n};
  for (int s = 1; s < kSets; ++s) {
    for (int lane = 0; lane < kWidth; ++lane) counts[s] -= above[s][lane];
  }
  // Turns "at least these" into "these and no others".
  for (int k = 0; k < kOrder; ++k) {
    for (int s = 0; s < kSets; ++s) {
      if ((s >> k & 1) == 0) counts[s] -= counts[s | 1 << k];
    }
  }
  for (int s = 0; s < kSets; ++s) {
    int cell = 0;
    for (int k = 0; k < kOrder; ++k) cell = 2 * cell + (s >> k & 1);
    hits[cell] += static_cast<uint32_t>(counts[s]);
  }
}

// Counts values in two bins for each variable; all rows begin and end alike.
inline void count_halves(const RowSlice* rows, const RowBins* const* bins, int order,
                         uint32_t* hits) {
  visit_dtype(rows[0].dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (order == 2) {
      count_halves_of<2, scalar_t>(rows, bins, hits);
    } else {
      count_halves_of<3, scalar_t>(rows, bins, hits);
    }
  });
}

// Counts a tile of values, given each variable's bins; the first variable is the slowest.
inline void count_tile(const int32_t* const* index, int order, int bins, int64_t n,
                       const Histogram& histogram) {
  int32_t cells[kBinTile];
  const I32 copy = (lane_index() & (histogram.copies - 1)) * static_cast<int32_t>(histogram.cells);
  for (int64_t i = 0; i < n; i += kLanes) {
    I32 cell = load_bits<I32>(index[0] + i);
    for (int k = 1; k < order; ++k) cell = cell * bins + load_bits<I32>(index[k] + i);
    cell += copy;
    std::memcpy(cells + i, &cell, sizeof cell);
  }
  uint32_t* hits = histogram.hits;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++hits[cells[i]];
    ++hits[cells[i + 1]];
    ++hits[cells[i + 2]];
    ++hits[cells[i + 3]];
  }
  for (; i < n; ++i) ++hits[cells[i]];
}

// Adds the histograms to the counts and empties them.
inline void flush_histogram(const Histogram& histogram, int64_t* counts) {
  const int64_t cells = histogram.cells;
  for (int copy = 0; copy < histogram.copies; ++copy) {
    uint32_t* hits = histogram.hits + copy * cells;
    for (int64_t c = 0; c < cells; ++c) counts[c] += hits[c];
    std::memset(hits, 0, cells * sizeof(uint32_t));
  }
}
