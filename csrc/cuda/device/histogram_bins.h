// The bins of numpy.histogram, rounding included, on the device.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include "element.h"
#include "reduce.h"

namespace mmfuse::cuda {

// Every operation of an edge is rounded by itself: a fused one would move values between bins.
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }

// A row's least and largest value, both NaN as soon as one value is.
template <typename acc_t>
struct Range {
  acc_t low = static_cast<acc_t>(INFINITY);
  acc_t high = static_cast<acc_t>(-INFINITY);
};

template <typename acc_t>
__device__ __forceinline__ void include(Range<acc_t>& range, acc_t low, acc_t high) {
  range.low = low < range.low || low != low ? low : range.low;
  range.high = high > range.high || high != high ? high : range.high;
}

// The range over the block, in every thread.
template <int kThreads, typename acc_t>
__device__ __forceinline__ Range<acc_t> block_range(Range<acc_t> range) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ acc_t low[kWarps];
  __shared__ acc_t high[kWarps];
  const auto over_warp = [](Range<acc_t>& mine) {
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      include(mine, __shfl_xor_sync(kFullMask, mine.low, delta),
              __shfl_xor_sync(kFullMask, mine.high, delta));
    }
  };
  over_warp(range);
  __syncthreads();  // the previous call's values have been read
  if (threadIdx.x % kWarpSize == 0) {
    low[threadIdx.x / kWarpSize] = range.low;
    high[threadIdx.x / kWarpSize] = range.high;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  Range<acc_t> all;
  if (lane < kWarps) all = {low[lane], high[lane]};
  over_warp(all);
  return all;
}

template <typename acc_t>
struct RowBins {
  acc_t low;
  acc_t width;
  acc_t step;
  acc_t per_step;  // about 1 / step
  bool valid;      // the range is finite
};

template <typename acc_t>
__device__ __forceinline__ RowBins<acc_t> row_bins(const Range<acc_t>& range, int bins) {
  RowBins<acc_t> out;
  out.valid = fabs(range.high - range.low) < static_cast<acc_t>(INFINITY);
  const acc_t half = range.low == range.high ? acc_t(0.5) : acc_t(0);
  out.low = range.low - half;
  out.width = (range.high + half) - out.low;
  out.step = out.width / static_cast<acc_t>(bins);
  out.per_step = acc_t(1) / out.step;
  return out;
}

// Edges never fall with i, because rounding keeps the order.
template <typename acc_t>
__device__ __forceinline__ acc_t bin_edge(const RowBins<acc_t>& row, int bins, int i) {
  const acc_t index = static_cast<acc_t>(i);
  const acc_t rise = row.step == acc_t(0) ? mul_rn(index / static_cast<acc_t>(bins), row.width)
                                          : mul_rn(index, row.step);
  return add_rn(rise, row.low);
}

// A guess that is NaN becomes 0.
template <typename acc_t>
__device__ __forceinline__ int guess_bin(const RowBins<acc_t>& row, int bins, acc_t x) {
  const acc_t guess = (x - row.low) * row.per_step;
  return static_cast<int>(fmin(fmax(guess, acc_t(0)), static_cast<acc_t>(bins - 1)));
}

// The last bin whose edge is not above x. The guess is off by more than one bin only if the range
// is no more than a few units in the last place wide.
template <typename acc_t>
__device__ __forceinline__ int bin_of(const RowBins<acc_t>& row, int bins, acc_t x) {
  int i = guess_bin(row, bins, x);
  while (i > 0 && bin_edge(row, bins, i) > x) --i;
  while (i < bins - 1 && bin_edge(row, bins, i + 1) <= x) ++i;
  return i;
}

// True if bin i is the one, by a single comparison in place of bin_of's loops; false in doubt.
template <typename acc_t>
__device__ __forceinline__ bool is_bin(const RowBins<acc_t>& row, int bins, int i, acc_t x) {
  const acc_t index = static_cast<acc_t>(i);
  const acc_t below = add_rn(mul_rn(index, row.step), row.low);
  const acc_t above = add_rn(mul_rn(index + acc_t(1), row.step), row.low);
  // Bitwise, because a branch costs more than a comparison.
  return (row.step != acc_t(0)) & (below <= x) & ((x < above) | (i == bins - 1));
}

}  // namespace mmfuse::cuda
