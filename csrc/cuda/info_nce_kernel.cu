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

// What is subtracted in the exponent: finite, so that infinities have no difference.
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

// Adds x[0], x[stride], ... before x[end], a batch at a time.
template <typename acc_t>
__device__ __forceinline__ LogSum<acc_t> strided_log_sum(const acc_t* x, int64_t stride,
                                                         int64_t count) {
  LogSum<acc_t> total{-static_cast<acc_t>(INFINITY), 0};
  for (int64_t first = 0; first < count; first += kBatch) {
    acc_t values[kBatch];
    acc_t max = total.max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      values[u] = first + u < count ? x[(first + u) * stride] : -static_cast<acc_t>(INFINITY);
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

// A block adds one row or, after the last of them, a warp's width of columns.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<acc_t>)
    add_tile_kernel(const Tile __grid_constant__ tile,
                    const LogSumExpState __grid_constant__ state) {
  __shared__ LogSum<acc_t> parts[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const acc_t* values = static_cast<const acc_t*>(tile.values);
  if (blockIdx.x < tile.rows) {
    const int64_t row = tile.row + blockIdx.x;
    const acc_t* x = values + blockIdx.x * tile.columns;
    auto total =
        strided_log_sum(x + threadIdx.x, kThreads, steps(tile.columns, threadIdx.x, kThreads));
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      const LogSum<acc_t> other{__shfl_xor_sync(kFullMask, total.max, delta),
                                __shfl_xor_sync(kFullMask, total.sum, delta)};
      total = merge(total, other);
    }
    if (lane == 0) parts[warp][0] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kWarps; ++w) total = merge(total, parts[w][0]);
    add_to(state.row_max, state.row_sum, row, tile.column == 0, total);
    const int64_t own = row - tile.column;
    if (0 <= own && own < tile.columns) static_cast<acc_t*>(state.diagonal)[row] = x[own];
  } else {
    const int64_t column = (blockIdx.x - tile.rows) * kWarpSize + lane;
    const int64_t rows = column < tile.columns ? steps(tile.rows, warp, kWarps) : 0;
    auto total =
        strided_log_sum(values + warp * tile.columns + column, kWarps * tile.columns, rows);
    parts[warp][lane] = total;
    __syncthreads();
    if (warp != 0 || column >= tile.columns) return;
    for (int w = 1; w < kWarps; ++w) total = merge(total, parts[w][lane]);
    add_to(state.column_max, state.column_sum, tile.column + column, tile.row == 0, total);
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

// A block has kSlopeRows rows of kSlopeColumns columns.
template <typename acc_t, int kPack>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<acc_t>)
    slope_kernel(const SlopeParams __grid_constant__ params) {
  constexpr int kPacks = kSlopeColumns / kThreads / kPack;
  const Tile& tile = params.tile;
  const acc_t scale = load_coefficient<acc_t>(params.grad, 0) / static_cast<acc_t>(params.batch);
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
    acc_t* x = static_cast<acc_t*>(tile.values) + row * tile.columns;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int64_t column = first + u * kThreads * kPack;
      if (column >= tile.columns) continue;
      auto pack = load_pack<true, kPack>(x + column);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const acc_t s = pack.v[j];
        const acc_t target = column + j == own ? acc_t(1) : acc_t(0);
        const acc_t slope = target - (exp(s - row_sum) + exp(s - columns[u].v[j])) * acc_t(0.5);
        product += slope * s;
        pack.v[j] = slope * scale;
      }
      store_pack<true>(x + column, pack);
    }
  }
  double sum[1] = {static_cast<double>(product)};
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) params.partials[blockIdx.y * gridDim.x + blockIdx.x] += sum[0];
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
  const int64_t blocks = tile.rows + chunk_count(tile.columns, kWarpSize);
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
  visit_wide(tile.wide, [&](auto* type) {
    using acc_t = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = kVectorBytes / sizeof(acc_t);
    const bool aligned = is_aligned(tile.values) &&
                         is_aligned(static_cast<const acc_t*>(params.columns) + tile.column) &&
                         tile.columns % kPack == 0;
    launch("slope_kernel", aligned ? slope_kernel<acc_t, kPack> : slope_kernel<acc_t, 1>, grid,
           kThreads, stream, params);
  });
}

void launch_grad_temperature(const GradTemperatureParams& params, cudaStream_t stream) {
  launch_partial_sums(params.partials, params.count, StoreGradTemperature{params}, stream);
}

}  // namespace mmfuse::cuda
