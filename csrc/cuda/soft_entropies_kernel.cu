#include <float.h>
#include <math.h>

#include <type_traits>

#include "cuda/device/part_range.h"
#include "soft_entropies.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBins = 256;

template <typename acc_t>
constexpr acc_t kLeast = std::is_same_v<acc_t, double> ? DBL_MIN : FLT_MIN;

// The reference does the same: constant rows are at the first of the bins' centres.
template <typename acc_t>
__device__ __forceinline__ void store_range(const SoftPairs& pairs, int variable, int64_t problem,
                                            Range<acc_t> range) {
  if (range.low > range.high) {
    // Nothing counts.
    range.low = range.high = static_cast<acc_t>(NAN);
  }
  constexpr acc_t kEpsilon = std::is_same_v<acc_t, double> ? DBL_EPSILON : FLT_EPSILON;
  if (range.low == range.high) {
    const acc_t least = fabs(range.low) * (acc_t(4) * kEpsilon);
    range.high += acc_t(2) * (least > acc_t(0.5) ? least : acc_t(0.5));
  }
  acc_t* out = static_cast<acc_t*>(pairs.ranges[variable]) + 2 * problem;
  out[0] = range.low;
  out[1] = range.high;
}

// The range of the values that count, low above high if there are none.
template <typename acc_t>
__device__ __forceinline__ Range<acc_t> present_range(const acc_t* x, const bool* present,
                                                      int elements) {
  Range<acc_t> range;
  for (int i = threadIdx.x; i < elements; i += kThreads) {
    if (present[i]) include(range, x[i], x[i]);
  }
  return block_range<kThreads>(range);
}

// Block (x, v) finds the range of one part of one row of variable v.
template <typename acc_t, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    soft_range_kernel(const SoftRangeParams __grid_constant__ params, int64_t parts) {
  const SoftPairs& pairs = params.pairs;
  const int variable = blockIdx.y;
  const RowPart part = row_part(blockIdx.x, parts, kEndsChunk, pairs.columns);
  const acc_t* x = static_cast<const acc_t*>(pairs.values[variable]) + part.begin;
  Range<acc_t> range;
  if constexpr (kMasked) {
    range = present_range(x, pairs.present + part.begin, part.elements);
  } else {
    range = part_range<false, kThreads>(x, part.elements);
  }
  if (threadIdx.x != 0) return;
  if (parts == 1) return store_range(pairs, variable, part.problem, range);
  acc_t* out = static_cast<acc_t*>(params.partials) +
               2 * (variable * pairs.problems * parts + static_cast<int64_t>(blockIdx.x));
  out[0] = range.low;
  out[1] = range.high;
}

// Block (p, v) merges the parts of a row.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    soft_range_merge_kernel(const SoftRangeParams __grid_constant__ params, int64_t parts) {
  const int64_t row = blockIdx.y * params.pairs.problems + blockIdx.x;
  const acc_t* found = static_cast<const acc_t*>(params.partials) + 2 * row * parts;
  Range<acc_t> range;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
    include(range, found[2 * i], found[2 * i + 1]);
  }
  range = block_range<kThreads>(range);
  if (threadIdx.x == 0) store_range(params.pairs, blockIdx.y, blockIdx.x, range);
}

// Block x counts the samples that are present in one part of one row.
__global__ void __launch_bounds__(kThreads)
    soft_count_kernel(const SoftPairs __grid_constant__ pairs, unsigned long long* out,
                      int64_t parts) {
  const RowPart part = row_part(blockIdx.x, parts, kEndsChunk, pairs.columns);
  const bool* present = pairs.present + part.begin;
  int counts[1] = {0};
  for (int i = threadIdx.x; i < part.elements; i += kThreads) counts[0] += present[i];
  block_sum<kThreads>(counts);
  // The order does not matter to whole numbers.
  if (threadIdx.x == 0 && counts[0] > 0) {
    atomicAdd(out + part.problem, static_cast<unsigned long long>(counts[0]));
  }
}

__device__ __forceinline__ int64_t samples_of(const SoftTables& tables, int64_t problem) {
  return tables.counts == nullptr ? tables.samples : static_cast<int64_t>(tables.counts[problem]);
}

// Leaves the sums of the table's rows and columns in margins[0] and margins[1].
template <typename acc_t>
__device__ __forceinline__ void find_margins(const acc_t* weights, int bins,
                                             double (&margins)[2][kMaxBins]) {
  for (int i = threadIdx.x / kWarpSize; i < bins; i += kThreads / kWarpSize) {
    double sum = 0;
    for (int j = threadIdx.x % kWarpSize; j < bins; j += kWarpSize) sum += weights[i * bins + j];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0) margins[0][i] = sum;
  }
  for (int j = threadIdx.x; j < bins; j += kThreads) {
    double sum = 0;
    for (int i = 0; i < bins; ++i) sum += weights[i * bins + j];
    margins[1][j] = sum;
  }
  __syncthreads();
}

// A share of the samples, and the logarithm of what is at least the smallest normal number.
template <typename acc_t>
struct ShareLog {
  acc_t p;
  acc_t log_p;
};

template <typename acc_t>
__device__ __forceinline__ ShareLog<acc_t> share_log(double count, int64_t samples) {
  const acc_t p = static_cast<acc_t>(count) / static_cast<acc_t>(samples);
  return {p, log(p < kLeast<acc_t> ? kLeast<acc_t> : p)};
}

template <typename acc_t, typename count_t>
__device__ __forceinline__ double part_entropy(const count_t* counts, int n, int64_t samples) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const ShareLog<acc_t> share = share_log<acc_t>(counts[i], samples);
    sum -= static_cast<double>(share.p * share.log_p);
  }
  return sum;
}

// Block x has one problem's table.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    soft_entropies_kernel(const SoftTables __grid_constant__ tables, void* entropies) {
  __shared__ double margins[2][kMaxBins];
  const int bins = tables.bins;
  const int cells = bins * bins;
  const int64_t problem = blockIdx.x;
  const acc_t* weights = static_cast<const acc_t*>(tables.weights) + problem * cells;
  find_margins(weights, bins, margins);
  const int64_t samples = samples_of(tables, problem);
  double sums[3] = {part_entropy<acc_t>(margins[0], bins, samples),
                    part_entropy<acc_t>(margins[1], bins, samples),
                    part_entropy<acc_t>(weights, cells, samples)};
  block_sum<kThreads>(sums);
  if (threadIdx.x != 0) return;
  acc_t* out = static_cast<acc_t*>(entropies) + 3 * problem;
  for (int k = 0; k < 3; ++k) out[k] = static_cast<acc_t>(sums[k]);
}

// The slope of -p log max(p, least) by the count: an empty cell has a finite one.
template <typename acc_t>
__device__ __forceinline__ acc_t slope_of(double count, int64_t samples, acc_t scale) {
  const ShareLog<acc_t> share = share_log<acc_t>(count, samples);
  return -scale * (share.log_p + (share.p < kLeast<acc_t> ? acc_t(0) : acc_t(1)));
}

// Block x has one problem's table.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    soft_slopes_kernel(const SoftTables __grid_constant__ tables, const void* grad, void* slopes) {
  __shared__ double margins[2][kMaxBins];
  const int bins = tables.bins;
  const int cells = bins * bins;
  const int64_t problem = blockIdx.x;
  const acc_t* weights = static_cast<const acc_t*>(tables.weights) + problem * cells;
  acc_t* out = static_cast<acc_t*>(slopes) + problem * cells;
  const acc_t* by = static_cast<const acc_t*>(grad) + 3 * problem;
  const int64_t count = samples_of(tables, problem);
  const acc_t samples = static_cast<acc_t>(count);
  find_margins(weights, bins, margins);
  for (int i = threadIdx.x; i < 2 * bins; i += kThreads) {
    double* margin = &margins[i / bins][i % bins];
    *margin = slope_of(*margin, count, by[i / bins] / samples);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < cells; i += kThreads) {
    const acc_t own = slope_of(static_cast<double>(weights[i]), count, by[2] / samples);
    out[i] = static_cast<acc_t>(margins[0][i / bins] + margins[1][i % bins]) + own;
  }
}

template <typename acc_t>
__device__ __forceinline__ Range<acc_t> load_range(const void* ranges, int64_t problem) {
  const acc_t* range = static_cast<const acc_t*>(ranges) + 2 * problem;
  return {range[0], range[1]};
}

// Block (x, v) counts the values at the ends in one part of one row of variable v.
template <typename acc_t, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    soft_count_ends_kernel(const SoftEndsParams __grid_constant__ params, int64_t parts) {
  const SoftPairs& pairs = params.pairs;
  const int variable = blockIdx.y;
  const RowPart part = row_part(blockIdx.x, parts, kEndsChunk, pairs.columns);
  const acc_t* x = static_cast<const acc_t*>(pairs.values[variable]) + part.begin;
  const Range<acc_t> range = load_range<acc_t>(pairs.ranges[variable], part.problem);
  int counts[2] = {0, 0};
  for (int i = threadIdx.x; i < part.elements; i += kThreads) {
    if (kMasked && !pairs.present[part.begin + i]) continue;
    counts[0] += x[i] == range.low;
    counts[1] += x[i] == range.high;
  }
  block_sum<kThreads>(counts);
  if (threadIdx.x != 0) return;
  // The order does not matter to whole numbers.
  unsigned long long* out = params.counts + 2 * (variable * pairs.problems + part.problem);
  for (int k = 0; k < 2; ++k) {
    if (counts[k] > 0) atomicAdd(out + k, static_cast<unsigned long long>(counts[k]));
  }
}

// Block (x, v) adds what the ends get, in equal shares, to the values that are there.
template <typename acc_t, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    soft_add_ends_kernel(const SoftEndsParams __grid_constant__ params, int64_t parts) {
  const SoftPairs& pairs = params.pairs;
  const int variable = blockIdx.y;
  const RowPart part = row_part(blockIdx.x, parts, kEndsChunk, pairs.columns);
  const acc_t* x = static_cast<const acc_t*>(pairs.values[variable]) + part.begin;
  acc_t* out = static_cast<acc_t*>(params.grads[variable]) + part.begin;
  const Range<acc_t> range = load_range<acc_t>(pairs.ranges[variable], part.problem);
  const Range<acc_t> grad = load_range<acc_t>(params.of_ranges[variable], part.problem);
  const unsigned long long* counts = params.counts + 2 * (variable * pairs.problems + part.problem);
  // The upper end of a constant row is above all values, and moves with them.
  const acc_t to_low = (counts[1] == 0 ? grad.low + grad.high : grad.low) /
                       static_cast<acc_t>(counts[0] > 0 ? counts[0] : 1);
  const acc_t to_high = grad.high / static_cast<acc_t>(counts[1] > 0 ? counts[1] : 1);
  for (int i = threadIdx.x; i < part.elements; i += kThreads) {
    if (kMasked && !pairs.present[part.begin + i]) continue;
    if (x[i] == range.low) out[i] += to_low;
    if (x[i] == range.high) out[i] += to_high;
  }
}

// Calls f with a null pointer of the values' type.
template <typename F>
void visit_wide(bool wide, const F& f) {
  wide ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace

void launch_soft_ranges(const SoftRangeParams& params, cudaStream_t stream) {
  const SoftPairs& pairs = params.pairs;
  if (pairs.problems == 0) return;
  const int64_t parts = chunk_count(pairs.columns, kEndsChunk);
  visit_wide(pairs.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    launch(
        "soft_range_kernel",
        pairs.present == nullptr ? soft_range_kernel<acc_t, false> : soft_range_kernel<acc_t, true>,
        dim3(static_cast<unsigned>(pairs.problems * parts), 2), kThreads, stream, params, parts);
    if (parts == 1) return;
    launch("soft_range_merge_kernel", soft_range_merge_kernel<acc_t>,
           dim3(static_cast<unsigned>(pairs.problems), 2), kThreads, stream, params, parts);
  });
}

void launch_soft_counts(const SoftPairs& pairs, unsigned long long* counts, cudaStream_t stream) {
  if (pairs.problems == 0) return;
  const int64_t parts = chunk_count(pairs.columns, kEndsChunk);
  launch("soft_count_kernel", soft_count_kernel, static_cast<unsigned>(pairs.problems * parts),
         kThreads, stream, pairs, counts, parts);
}

void launch_soft_entropies(const SoftTables& tables, void* entropies, cudaStream_t stream) {
  if (tables.problems == 0) return;
  visit_wide(tables.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    launch("soft_entropies_kernel", soft_entropies_kernel<acc_t>,
           static_cast<unsigned>(tables.problems), kThreads, stream, tables, entropies);
  });
}

void launch_soft_slopes(const SoftTables& tables, const void* grad, void* slopes,
                        cudaStream_t stream) {
  if (tables.problems == 0) return;
  visit_wide(tables.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    launch("soft_slopes_kernel", soft_slopes_kernel<acc_t>, static_cast<unsigned>(tables.problems),
           kThreads, stream, tables, grad, slopes);
  });
}

void launch_soft_ends(const SoftEndsParams& params, cudaStream_t stream) {
  const SoftPairs& pairs = params.pairs;
  if (pairs.problems == 0) return;
  const int64_t parts = chunk_count(pairs.columns, kEndsChunk);
  const dim3 grid(static_cast<unsigned>(pairs.problems * parts), 2);
  visit_wide(pairs.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    const bool masked = pairs.present != nullptr;
    launch("soft_count_ends_kernel",
           masked ? soft_count_ends_kernel<acc_t, true> : soft_count_ends_kernel<acc_t, false>,
           grid, kThreads, stream, params, parts);
    launch("soft_add_ends_kernel",
           masked ? soft_add_ends_kernel<acc_t, true> : soft_add_ends_kernel<acc_t, false>, grid,
           kThreads, stream, params, parts);
  });
}

}  // namespace mmfuse::cuda
