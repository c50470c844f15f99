#include <float.h>
#include <math.h>

#include <type_traits>

#include "cuda/device/partial_sums.h"
#include "info_nce.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Twice the registers for float64, whose exponential needs them.
template <typename acc_t>
constexpr int kBlocksPerSm = std::is_same_v<acc_t, double> ? 2 : 4;
// Elements that a thread has in flight, and adds under one maximum.
constexpr int kBatch = 8;

template <typename acc_t>
constexpr acc_t kLargest = std::is_same_v<acc_t, double> ? DBL_MAX : FLT_MAX;

// sum = total of e^(x - max) over what has been seen.
template <typename acc_t>
struct LogSum {
  acc_t max;
  acc_t sum;
};

// Subtracted in the exponent: finite, so that infinities have no difference.
template <typename acc_t>
__device__ __forceinline__ acc_t shift_of(acc_t max) {
  max = max > kLargest<acc_t> ? kLargest<acc_t> : max;
  return max < -kLargest<acc_t> ? -kLargest<acc_t> : max;
}

// e^(x - shift), 1 where x is infinite; NaN stays.
template <typename acc_t>
__device__ __forceinline__ acc_t exp_below(acc_t x, acc_t shift) {
  const acc_t below = x - shift;
  return exp(below > 0 ? acc_t(0) : below);
}

template <typename acc_t>
__device__ __forceinline__ LogSum<acc_t> merge(const LogSum<acc_t>& a, const LogSum<acc_t>& b) {
  const acc_t max = a.max > b.max ? a.max : b.max;
  const acc_t shift = shift_of(max);
  return {max,
          a.sum * exp_below(shift_of(a.max), shift) + b.sum * exp_below(shift_of(b.max), shift)};
}

// Adds x[0], x[stride], ... before x[end], times the factor, a batch at a time.
template <typename acc_t>
__device__ __forceinline__ LogSum<acc_t> strided_log_sum(const acc_t* x, int64_t stride,
                                                         int64_t count, acc_t factor) {
  LogSum<acc_t> total{-static_cast<acc_t>(INFINITY), 0};
  for (int64_t first = 0; first < count; first += kBatch) {
    acc_t values[kBatch];
    acc_t max = total.max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      values[u] =
          first + u < count ? x[(first + u) * stride] * factor : -static_cast<acc_t>(INFINITY);
      max = values[u] > max ? values[u] : max;
    }
    const acc_t shift = shift_of(max);
    acc_t sum = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) sum += exp_below(values[u], shift);
    total.sum = total.sum * exp_below(shift_of(total.max), shift) + sum;
    total.max = max;
  }
  return total;
}

// Elements of 0, ..., count - 1 that start at `first` and are `step` apart.
__device__ __forceinline__ int64_t steps(int64_t count, int64_t first, int64_t step) {
  return first < count ? (count - first + step - 1) / step : 0;
}

template <typename acc_t>
__device__ __forceinline__ void add_to(void* all_max, void* all_sum, int64_t i, bool is_first,
                                       LogSum<acc_t> total) {
  acc_t* max = static_cast<acc_t*>(all_max) + i;
  acc_t* sum = static_cast<acc_t*>(all_sum) + i;
  if (!is_first) total = merge(LogSum<acc_t>{*max, *sum}, total);
  *max = total.max;
  *sum = total.sum;
}

// Columns of a block: a sector of memory for each of its rows in float32. Blocks of columns have
// much to read, so that there have to be many, and that they come first.
constexpr int kLineColumns = 8;
constexpr int kLineRows = kThreads / kLineColumns;

MMFUSE_HD int64_t column_blocks(int64_t columns) { return chunk_count(columns, kLineColumns); }

template <typename acc_t>
__device__ __forceinline__ acc_t inverse_temperature(const Tile& tile) {
  return acc_t(1) / load_coefficient<acc_t>(tile.temperature, 0);
}

// A block adds a few columns or, after the last of them, one row.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<acc_t>)
    add_tile_kernel(const Tile __grid_constant__ tile,
                    const LogSumExpState __grid_constant__ state) {
  __shared__ LogSum<acc_t> parts[kThreads];
  const acc_t factor = inverse_temperature<acc_t>(tile);
  const acc_t* values = static_cast<const acc_t*>(tile.values);
  const int64_t before = column_blocks(tile.columns);
  if (blockIdx.x < before) {
    const int line = threadIdx.x % kLineColumns;
    const int first = threadIdx.x / kLineColumns;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kLineColumns + line;
    const int64_t rows = column < tile.columns ? steps(tile.rows, first, kLineRows) : 0;
    auto total = strided_log_sum(values + first * tile.columns + column, kLineRows * tile.columns,
                                 rows, factor);
    parts[threadIdx.x] = total;
    __syncthreads();
    if (first != 0 || column >= tile.columns) return;
    for (int r = 1; r < kLineRows; ++r) total = merge(total, parts[r * kLineColumns + line]);
    add_to(state.column_max, state.column_sum, tile.column + column, tile.row == 0, total);
  } else {
    const int64_t own_row = blockIdx.x - before;
    const int64_t row = tile.row + own_row;
    const acc_t* x = values + own_row * tile.columns;
    auto total = strided_log_sum(x + threadIdx.x, kThreads,
                                 steps(tile.columns, threadIdx.x, kThreads), factor);
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      const LogSum<acc_t> other{__shfl_xor_sync(kFullMask, total.max, delta),
                                __shfl_xor_sync(kFullMask, total.sum, delta)};
      total = merge(total, other);
    }
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kWarps; ++w) total = merge(total, parts[w]);
    add_to(state.row_max, state.row_sum, row, tile.column == 0, total);
    const int64_t own = row - tile.column;
    if (0 <= own && own < tile.columns) {
      static_cast<acc_t*>(state.diagonal)[row] = x[own] * factor;
    }
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kFinishRows)
    info_nce_kernel(const InfoNceParams __grid_constant__ params) {
  const LogSumExpState& state = params.state;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishRows + threadIdx.x;
  double term[1] = {0};
  if (i < params.batch) {
    const auto result = [i](const void* max, const void* sum) {
      return static_cast<double>(static_cast<const acc_t*>(max)[i]) +
             log(static_cast<double>(static_cast<const acc_t*>(sum)[i]));
    };
    const double row = result(state.row_max, state.row_sum);
    const double column = result(state.column_max, state.column_sum);
    static_cast<acc_t*>(params.rows)[i] = static_cast<acc_t>(row);
    static_cast<acc_t*>(params.columns)[i] = static_cast<acc_t>(column);
    term[0] = static_cast<const acc_t*>(state.diagonal)[i] - (row + column) / 2;
  }
  block_sum<kFinishRows>(term);
  if (threadIdx.x == 0) params.partials[blockIdx.x] = term[0];
}

struct StoreBound {
  void* bound;
  int64_t batch;
  bool wide;

  __device__ void operator()(double sum) const {
    const double count = static_cast<double>(batch);
    store_result(bound, wide, sum / count + log(count));
  }
};

// Writes slopes where their inner products were, or as two halves.
template <typename acc_t, typename out_t, int kPack>
__device__ __forceinline__ void store_slopes(const SlopeParams& params, int64_t row, int64_t column,
                                             const Pack<acc_t, kPack>& slopes) {
  const Tile& tile = params.tile;
  const int64_t at = row * tile.columns + column;
  if constexpr (std::is_same_v<acc_t, out_t>) {
    store_pack<true>(static_cast<acc_t*>(tile.values) + at, slopes);
  } else {
    Pack<out_t, kPack> first, rest;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      first.v[j] = round_to<out_t>(slopes.v[j]);
      rest.v[j] = round_to<out_t>(slopes.v[j] - widen<acc_t>(first.v[j]));
    }
    out_t* out = static_cast<out_t*>(params.halves) + at;
    store_pack<true>(out, first);
    store_pack<true>(out + tile.rows * tile.columns, rest);
  }
}

// A block has kSlopeRows rows of kSlopeColumns columns.
template <typename acc_t, typename out_t, int kPack>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<acc_t>)
    slope_kernel(const SlopeParams __grid_constant__ params) {
  constexpr int kPacks = kSlopeColumns / kThreads / kPack;
  const Tile& tile = params.tile;
  constexpr bool kHalves = !std::is_same_v<acc_t, out_t>;
  const acc_t factor = inverse_temperature<acc_t>(tile);
  const acc_t scale =
      kHalves ? static_cast<acc_t>(half_scale(kDType<out_t>))
              : load_coefficient<acc_t>(params.grad, 0) / static_cast<acc_t>(params.batch);
  const acc_t* all_columns = static_cast<const acc_t*>(params.columns) + tile.column;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSlopeColumns + threadIdx.x * kPack;
  Pack<acc_t, kPack> columns[kPacks] = {};
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
    const int64_t column = first + u * kThreads * kPack;
    if (column < tile.columns) columns[u] = load_pack<true, kPack>(all_columns + column);
  }
  acc_t product = 0;
  for (int r = 0; r < kSlopeRows; ++r) {
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kSlopeRows + r;
    if (row >= tile.rows) break;
    const acc_t row_sum = static_cast<const acc_t*>(params.rows)[tile.row + row];
    const int64_t own = tile.row + row - tile.column;
    const acc_t* x = static_cast<const acc_t*>(tile.values) + row * tile.columns;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int64_t column = first + u * kThreads * kPack;
      if (column >= tile.columns) continue;
      auto pack = load_pack<true, kPack>(x + column);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const acc_t s = pack.v[j] * factor;
        const acc_t target = column + j == own ? acc_t(1) : acc_t(0);
        const acc_t slope = target - (exp(s - row_sum) + exp(s - columns[u].v[j])) * acc_t(0.5);
        product += slope * s;
        pack.v[j] = slope * scale;
      }
      store_slopes<acc_t, out_t, kPack>(params, row, column, pack);
    }
  }
  double sum[1] = {static_cast<double>(product)};
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) params.partials[blockIdx.y * gridDim.x + blockIdx.x] += sum[0];
}

__global__ void __launch_bounds__(kThreads)
    add_product_kernel(const AddProductParams __grid_constant__ params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= params.count) return;
  const float scale = load_coefficient<float>(params.grad, 0) / static_cast<float>(params.batch);
  params.sums[i] += params.product[i] * (scale / half_scale(params.half_dtype));
}

struct StoreGradTemperature {
  GradTemperatureParams params;

  __device__ void operator()(double sum) const {
    const double scale =
        load_coefficient<double>(params.grad, 0) / static_cast<double>(params.batch);
    const double temperature = load_coefficient<double>(params.temperature, 0);
    store_result(params.grad_temperature, params.temperature.wide, -scale * sum / temperature);
  }
};

// Calls f with a null pointer of the similarities' type.
template <typename F>
void visit_wide(bool wide, const F& f) {
  wide ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace

void launch_add_tile(const Tile& tile, const LogSumExpState& state, cudaStream_t stream) {
  const int64_t blocks = column_blocks(tile.columns) + tile.rows;
  visit_wide(tile.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    launch("add_tile_kernel", add_tile_kernel<acc_t>, static_cast<unsigned>(blocks), kThreads,
           stream, tile, state);
  });
}

void launch_info_nce(const InfoNceParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.batch, kFinishRows);
  visit_wide(params.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    launch("info_nce_kernel", info_nce_kernel<acc_t>, static_cast<unsigned>(blocks), kFinishRows,
           stream, params);
  });
  launch_partial_sums(params.partials, blocks, StoreBound{params.bound, params.batch, params.wide},
                      stream);
}

void launch_slope(const SlopeParams& params, cudaStream_t stream) {
  const Tile& tile = params.tile;
  const dim3 grid(static_cast<unsigned>(chunk_count(tile.columns, kSlopeColumns)),
                  static_cast<unsigned>(chunk_count(tile.rows, kSlopeRows)));
  visit_dtype(params.halves != nullptr ? params.half_dtype
              : tile.wide              ? DType::kFloat64
                                       : DType::kFloat32,
              [&](auto* type) {
                using out_t = std::remove_pointer_t<decltype(type)>;
                using acc_t = acc_type<out_t>;
                constexpr int kPack = kVectorBytes / sizeof(acc_t);
                const bool aligned =
                    is_aligned(tile.values) && is_aligned(params.halves) &&
                    is_aligned(static_cast<const acc_t*>(params.columns) + tile.column) &&
                    tile.columns % kPack == 0;
                launch("slope_kernel",
                       aligned ? slope_kernel<acc_t, out_t, kPack> : slope_kernel<acc_t, out_t, 1>,
                       grid, kThreads, stream, params);
              });
}

void launch_add_product(const AddProductParams& params, cudaStream_t stream) {
  if (params.count == 0) return;
  launch("add_product_kernel", add_product_kernel,
         static_cast<unsigned>(chunk_count(params.count, kThreads)), kThreads, stream, params);
}

void launch_grad_temperature(const GradTemperatureParams& params, cudaStream_t stream) {
  launch_partial_sums(params.partials, params.count, StoreGradTemperature{params}, stream);
}

}  // namespace mmfuse::cuda
