#include <type_traits>

#include "cuda/device/histogram_entropies.h"
#include "cuda/device/part_range.h"
#include "joint_entropies.h"

namespace mmfuse::cuda {
namespace {

constexpr int kWholeThreads = 256;
constexpr int kPartThreads = 512;
constexpr int kRangeThreads = 512;
constexpr int kEntropyThreads = 512;
template <typename scalar_t>
constexpr int kPartBlocksPerSm = std::is_same_v<scalar_t, double> ? 2 : 3;

// Rows up to here are not worth more than one block, nor are longer ones if there are this many.
constexpr int64_t kShortRow = 8192;
constexpr int64_t kManyProblems = 256;

constexpr int kMaxVariables = 8;
constexpr int kMaxTuples = 28;
constexpr int kMaxRangeRows = 64;

// Limits of shared memory: for more than one tuple, and for copies of their counts.
constexpr int kGroupBytes = 56 * 1024;
constexpr int kCopiesBytes = 16 * 1024;
constexpr int kMaxCopies = 8;

// Tuples that follow each other in the call and are counted by one block.
struct TupleGroup {
  int64_t problems;
  int64_t columns;
  int64_t parts;  // blocks that share a problem,
  int64_t chunk;  // and how many values each of them counts
  int64_t range_parts;
  const double* ranges;
  double* entropies;
  int64_t* counts;
  int64_t first_tuple;
  int order;
  int bins;
  int cells;
  int variables;
  int tuples;
  int copies;  // of the counts in shared memory; 0: they do not fit
  const void* data[kMaxVariables];
  int32_t variable[kMaxVariables];  // position in the call
  uint8_t members[kMaxTuples][kMaxOrder];
};

struct RangeTable {
  int64_t columns;
  int64_t parts;
  int64_t chunk;
  int64_t problems;
  double* ranges;
  const void* data[kMaxRangeRows];
};

// Block (x, k) finds the range of one part of one row of variable k.
template <typename scalar_t, bool kVector>
__global__ void __launch_bounds__(kRangeThreads)
    range_kernel(const RangeTable __grid_constant__ table) {
  const RowPart part = row_part(blockIdx.x, table.parts, table.chunk, table.columns);
  const scalar_t* data = static_cast<const scalar_t*>(table.data[blockIdx.y]) + part.begin;
  const auto range = part_range<kVector, kRangeThreads>(data, part.elements);
  if (threadIdx.x == 0) {
    const int64_t row = blockIdx.y * table.problems + part.problem;
    double* out = table.ranges + 2 * (row * table.parts + part.part);
    out[0] = range.low;
    out[1] = range.high;
  }
}

__device__ __forceinline__ int64_t tuple_row(const TupleGroup& group, int t, int64_t problem) {
  return (group.first_tuple + t) * group.problems + problem;
}

// True if all variables of tuple t have a finite range here.
template <typename acc_t>
__device__ __forceinline__ bool is_valid(const TupleGroup& group, int t,
                                         const RowBins<acc_t>* rows) {
  bool valid = true;
  for (int m = 0; m < group.order; ++m) valid = valid && rows[group.members[t][m]].valid;
  return valid;
}

// Leaves each variable's bins in rows[], from its data or from what range_kernel found.
template <typename scalar_t, bool kVector, bool kWhole, int kThreads>
__device__ __forceinline__ void find_bins(const TupleGroup& group, const RowPart& part,
                                          RowBins<acc_type<scalar_t>>* rows) {
  using acc_t = acc_type<scalar_t>;
  for (int v = 0; v < group.variables; ++v) {
    Range<acc_t> range;
    if constexpr (kWhole) {
      const scalar_t* data = static_cast<const scalar_t*>(group.data[v]) + part.begin;
      range = part_range<kVector, kThreads>(data, part.elements);
    } else {
      const int64_t row = group.variable[v] * group.problems + part.problem;
      const double* found = group.ranges + 2 * row * group.range_parts;
      for (int i = threadIdx.x; i < group.range_parts; i += kThreads) {
        include(range, static_cast<acc_t>(found[2 * i]), static_cast<acc_t>(found[2 * i + 1]));
      }
      range = block_range<kThreads>(range);
    }
    if (threadIdx.x == 0) rows[v] = row_bins(range, group.bins);
  }
}

// count_part for one pair of variables, whose bins need not be staged.
template <typename scalar_t, bool kVector, int kThreads>
__device__ __forceinline__ void count_pair(const TupleGroup& group, const RowPart& part,
                                           const RowBins<acc_type<scalar_t>>* rows,
                                           uint32_t* hits) {
  const int a = group.members[0][0];
  const int b = group.members[0][1];
  const RowBins<acc_type<scalar_t>> first = rows[a];
  const RowBins<acc_type<scalar_t>> second = rows[b];
  if (!first.valid || !second.valid) return;
  const scalar_t* const first_data = static_cast<const scalar_t*>(group.data[a]) + part.begin;
  const scalar_t* const second_data = static_cast<const scalar_t*>(group.data[b]) + part.begin;
  const int bins = group.bins;
  uint32_t* const counts = hits + threadIdx.x / kWarpSize % group.copies * group.cells;
  for (int tile = 0; tile < part.elements; tile += kRowPack * kThreads) {
    const int count = tile_count<kVector, kThreads>(tile, part.elements);
    acc_type<scalar_t> x[kRowPack], y[kRowPack];
    load_tile<kVector, kThreads>(first_data, tile, count, x);
    load_tile<kVector, kThreads>(second_data, tile, count, y);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j >= count) continue;
      int i = guess_bin(first, bins, x[j]);
      int k = guess_bin(second, bins, y[j]);
      if (!(is_bin(first, bins, i, x[j]) & is_bin(second, bins, k, y[j]))) {
        i = bin_of(first, bins, x[j]);
        k = bin_of(second, bins, y[j]);
      }
      atomicAdd(counts + i * bins + k, 1u);
    }
  }
}

// Counts the part in `hits`, if the counts fit there, else in global memory. A thread's four bins
// of each variable make one word of `staged`, and serve all tuples.
template <typename scalar_t, bool kVector, int kThreads>
__device__ __forceinline__ void count_part(const TupleGroup& group, const RowPart& part,
                                           const RowBins<acc_type<scalar_t>>* rows, uint32_t* hits,
                                           uint32_t* staged) {
  uint32_t* const mine = staged + threadIdx.x;
  const int bins = group.bins;
  const int copy = group.copies > 1 ? threadIdx.x / kWarpSize % group.copies : 0;
  for (int tile = 0; tile < part.elements; tile += kRowPack * kThreads) {
    const int count = tile_count<kVector, kThreads>(tile, part.elements);
    if (count == 0) break;
    for (int v = 0; v < group.variables; ++v) {
      const RowBins<acc_type<scalar_t>> row = rows[v];
      if (!row.valid) continue;
      acc_type<scalar_t> x[kRowPack];
      const scalar_t* data = static_cast<const scalar_t*>(group.data[v]) + part.begin;
      load_tile<kVector, kThreads>(data, tile, count, x);
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < kRowPack; ++j) {
        word |= static_cast<uint32_t>(bin_of(row, bins, x[j])) << 8 * j;
      }
      mine[v * kThreads] = word;
    }
    for (int t = 0; t < group.tuples; ++t) {
      if (!is_valid(group, t, rows)) continue;
      const uint8_t* members = group.members[t];
      const uint32_t first = mine[members[0] * kThreads];
      const uint32_t second = mine[members[1] * kThreads];
      const uint32_t third = group.order == 3 ? mine[members[2] * kThreads] : 0;
      uint32_t* const counts = hits + (copy * group.tuples + t) * group.cells;
#pragma unroll
      for (int j = 0; j < kRowPack; ++j) {
        if (j >= count) continue;
        int cell = (first >> 8 * j & 255u) * bins + (second >> 8 * j & 255u);
        if (group.order == 3) cell = cell * bins + (third >> 8 * j & 255u);
        if (group.copies > 0) {
          atomicAdd(counts + cell, 1u);
        } else {
          atomicAdd(reinterpret_cast<unsigned long long*>(
                        group.counts + tuple_row(group, t, part.problem) * group.cells + cell),
                    1ull);
        }
      }
    }
  }
}

// Block x counts one part of one problem. kWhole: the part is the problem, and the block finds the
// ranges before and the entropies after.
template <typename scalar_t, bool kVector, bool kWhole, int kThreads>
__global__ void __launch_bounds__(kThreads, kWhole ? 4 : kPartBlocksPerSm<scalar_t>)
    joint_histogram_kernel(const TupleGroup __grid_constant__ group) {
  __shared__ RowBins<acc_type<scalar_t>> rows[kMaxVariables];
  double* const margins = dynamic_shared<double>();
  uint32_t* const hits =
      reinterpret_cast<uint32_t*>(margins + (kWhole ? margin_values(group.order, group.bins) : 0));
  const int words = group.tuples * group.cells;
  for (int i = threadIdx.x; i < group.copies * words; i += kThreads) hits[i] = 0;
  // From the last part to the first: what range_kernel read last is still in the cache.
  const RowPart part =
      row_part(gridDim.x - 1 - blockIdx.x, group.parts, group.chunk, group.columns);
  find_bins<scalar_t, kVector, kWhole, kThreads>(group, part, rows);
  __syncthreads();
  // Otherwise registers would spill.
  constexpr bool kHasPair = !kWhole && !std::is_same_v<scalar_t, double>;
  if (kHasPair && group.order == 2 && group.tuples == 1 && group.copies > 0) {
    count_pair<scalar_t, kVector, kThreads>(group, part, rows, hits);
  } else {
    count_part<scalar_t, kVector, kThreads>(group, part, rows, hits, hits + group.copies * words);
  }
  if (group.copies == 0) return;
  __syncthreads();
  for (int t = 0; t < group.tuples; ++t) {
    int64_t* const out = group.counts + tuple_row(group, t, part.problem) * group.cells;
    for (int i = threadIdx.x; i < group.cells; i += kThreads) {
      uint32_t count = 0;
      for (int copy = 0; copy < group.copies; ++copy)
        count += hits[copy * words + t * group.cells + i];
      if constexpr (kWhole) {
        hits[t * group.cells + i] = count;
        out[i] = count;
      } else if (count > 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(out + i),
                  static_cast<unsigned long long>(count));
      }
    }
  }
  if constexpr (kWhole) {
    const int margin_count = (1 << group.order) - 1;
    for (int t = 0; t < group.tuples; ++t) {
      __syncthreads();
      store_entropies<kThreads>(hits + t * group.cells, group.order, group.bins, margins,
                                group.entropies + tuple_row(group, t, part.problem) * margin_count);
    }
  }
}

// Block x finds the entropies of one tuple of one problem.
__global__ void __launch_bounds__(kEntropyThreads, 2)
    entropies_kernel(const int64_t* counts, int order, int bins, int cells, double* entropies) {
  const int64_t row = blockIdx.x;
  store_entropies<kEntropyThreads>(counts + row * cells, order, bins, dynamic_shared<double>(),
                                   entropies + row * ((1 << order) - 1));
}

int cells_of(const JointEntropiesParams& params) {
  return params.bins * params.bins * (params.order == 3 ? params.bins : 1);
}

// Shared memory of a block that has this many counts in all.
int histogram_bytes(const JointEntropiesParams& params, bool whole, int counts, int variables) {
  const int margins = whole ? margin_values(params.order, params.bins) : 0;
  const int threads = whole ? kWholeThreads : kPartThreads;
  return margins * static_cast<int>(sizeof(double)) +
         (counts + variables * threads) * static_cast<int>(sizeof(uint32_t));
}

// Puts as many tuples from `first` on into the group as one block can count.
void fill_group(const JointEntropiesParams& params, bool whole, int64_t first, TupleGroup& group) {
  const int64_t tuples = static_cast<int64_t>(params.tuples.size()) / params.order;
  group.first_tuple = first;
  group.variables = 0;
  group.tuples = 0;
  while (first + group.tuples < tuples && group.tuples < kMaxTuples) {
    const int64_t* members = params.tuples.data() + (first + group.tuples) * params.order;
    int variables = group.variables;
    for (int m = 0; m < params.order; ++m) {
      const int32_t k = static_cast<int32_t>(members[m]);
      int v = 0;
      while (v < variables && group.variable[v] != k) ++v;
      if (v == kMaxVariables) return;
      if (v == variables) {
        group.variable[variables] = k;
        group.data[variables++] = params.data[k];
      }
      group.members[group.tuples][m] = static_cast<uint8_t>(v);
    }
    const int bytes = histogram_bytes(params, whole, (group.tuples + 1) * group.cells, variables);
    if (group.tuples > 0 && bytes > kGroupBytes) return;
    group.variables = variables;
    ++group.tuples;
  }
}

template <typename scalar_t, bool kVector, bool kWhole>
void launch_group(const TupleGroup& group, int bytes, cudaStream_t stream) {
  constexpr int kThreads = kWhole ? kWholeThreads : kPartThreads;
  launch_shared(
      "joint_histogram_kernel", joint_histogram_kernel<scalar_t, kVector, kWhole, kThreads>,
      static_cast<unsigned>(group.problems * group.parts), kThreads, bytes, stream, group);
}

// Decides how a group's problems are spread over blocks, and how many copies of the counts a block
// keeps, so that its warps do not wait for each other.
template <typename scalar_t>
void launch_histograms(const JointEntropiesParams& params, bool whole, bool vector,
                       TupleGroup& group, cudaStream_t stream) {
  const int counts = group.tuples * group.cells;
  const int bytes_once = histogram_bytes(params, whole, counts, group.variables);
  const bool fits = bytes_once <= max_shared_bytes();
  group.parts = 1;
  group.chunk = group.columns;
  if (!whole) {
    // The counts that a block adds to the others' must not cost more than counting does.
    const int64_t least = fits ? std::max<int64_t>(4096, 2 * int64_t{counts}) : 4096;
    const int64_t most_parts = resident_blocks(chunk_count(params.problems * params.columns, least),
                                               kPartBlocksPerSm<scalar_t>);
    const int64_t parts = chunk_count(most_parts, params.problems);
    const int64_t chunk = std::max(least, chunk_count(params.columns, parts));
    group.chunk = std::min(kMaxPart, (chunk + 7) / 8 * 8);
    group.parts = chunk_count(params.columns, group.chunk);
  }
  group.copies = fits ? 1 : 0;
  while (fits && group.copies < kMaxCopies && 2 * group.copies * counts <= group.chunk / 8 &&
         2 * group.copies * counts * static_cast<int>(sizeof(uint32_t)) <= kCopiesBytes) {
    group.copies *= 2;
  }
  const int bytes = histogram_bytes(params, whole, group.copies * counts, group.variables);
  if (whole) {
    vector ? launch_group<scalar_t, true, true>(group, bytes, stream)
           : launch_group<scalar_t, false, true>(group, bytes, stream);
  } else {
    vector ? launch_group<scalar_t, true, false>(group, bytes, stream)
           : launch_group<scalar_t, false, false>(group, bytes, stream);
  }
}

template <typename scalar_t>
void launch_ranges(const JointEntropiesParams& params, bool vector, cudaStream_t stream) {
  RangeTable table;
  table.columns = params.columns;
  table.chunk = range_chunk(params.columns);
  table.parts = chunk_count(params.columns, table.chunk);
  table.problems = params.problems;
  const int64_t total = static_cast<int64_t>(params.data.size());
  for (int64_t first = 0; first < total; first += kMaxRangeRows) {
    const int64_t count = std::min<int64_t>(total - first, kMaxRangeRows);
    std::copy_n(params.data.begin() + first, count, table.data);
    table.ranges = params.ranges + 2 * first * params.problems * table.parts;
    const dim3 grid(static_cast<unsigned>(params.problems * table.parts),
                    static_cast<unsigned>(count));
    launch("range_kernel", vector ? range_kernel<scalar_t, true> : range_kernel<scalar_t, false>,
           grid, kRangeThreads, stream, table);
  }
}

void launch_entropies(const JointEntropiesParams& params, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(params.tuples.size()) / params.order * params.problems;
  const int bytes = margin_values(params.order, params.bins) * static_cast<int>(sizeof(double));
  launch_shared("entropies_kernel", entropies_kernel, static_cast<unsigned>(rows), kEntropyThreads,
                bytes, stream, params.counts, params.order, params.bins, cells_of(params),
                params.entropies);
}

}  // namespace

bool block_per_problem(const JointEntropiesParams& params) {
  const bool short_or_many = params.columns <= kShortRow || params.problems >= kManyProblems;
  return short_or_many && params.columns <= kMaxPart &&
         histogram_bytes(params, true, cells_of(params), params.order) <= max_shared_bytes();
}

void launch_joint_entropies(const JointEntropiesParams& params, cudaStream_t stream) {
  if (params.problems == 0 || params.tuples.empty()) return;
  const bool whole = block_per_problem(params);
  const bool vector = rows_aligned(params.problems, params.columns) &&
                      std::all_of(params.data.begin(), params.data.end(),
                                  [](const void* x) { return is_aligned(x); });
  TupleGroup group;
  group.problems = params.problems;
  group.columns = params.columns;
  group.range_parts = chunk_count(params.columns, range_chunk(params.columns));
  group.ranges = params.ranges;
  group.entropies = params.entropies;
  group.counts = params.counts;
  group.order = params.order;
  group.bins = params.bins;
  group.cells = cells_of(params);
  const int64_t tuples = static_cast<int64_t>(params.tuples.size()) / params.order;
  visit_dtype(params.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (!whole && !params.ranges_found) launch_ranges<scalar_t>(params, vector, stream);
    for (int64_t first = 0; first < tuples; first += group.tuples) {
      fill_group(params, whole, first, group);
      launch_histograms<scalar_t>(params, whole, vector, group, stream);
    }
  });
  if (!whole) launch_entropies(params, stream);
}

}  // namespace mmfuse::cuda
