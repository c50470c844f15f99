#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmfuse::cpu {

constexpr int kMaxBins = 256;

// The values of one row from `begin` to `end`; the data pointer is that of the row.
struct RowSlice {
  DType dtype;
  const void* x;
  int64_t begin;
  int64_t end;
};

// The range of some values; of no use where one of them is NaN or infinite.
struct RowRange {
  double low;
  double high;
  bool finite;
};

// The bins of one row, in its accumulator's precision: bin i begins at edges[i].
struct RowBins {
  bool valid;
  int bins;
  double low;
  double step;
  // 1 / step where a value's distance from low tells its nearest edge for certain, else 0.
  double inverse_step;
  union {
    float f32[kMaxBins + 1];
    double f64[kMaxBins + 1];
  } edges;
};

inline float* edges_of(RowBins& bins, float) { return bins.edges.f32; }
inline double* edges_of(RowBins& bins, double) { return bins.edges.f64; }
inline const float* edges_of(const RowBins& bins, float) { return bins.edges.f32; }
inline const double* edges_of(const RowBins& bins, double) { return bins.edges.f64; }

// Values whose bins are kept in L1 at a time; a multiple of every block of the kernels.
constexpr int64_t kBinTile = 1024;

// `copies` histograms of `cells` cells each, next to each other; successive values go to different
// ones, so that the increments of a popular cell do not wait for each other.
struct Histogram {
  uint32_t* hits;
  int64_t cells;
  int copies;
};

}  // namespace mmfuse::cpu
