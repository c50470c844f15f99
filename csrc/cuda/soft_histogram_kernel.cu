#include <math.h>

#include <type_traits>

#include "cuda/device/flag.h"
#include "cuda/device/histogram_bins.h"
#include "cuda/device/reduce.h"
#include "cuda/device/row_part.h"
#include "cuda/device/soft_shares.h"
#include "soft_histogram.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
template <typename scalar_t>
constexpr int kBlocksPerSm = std::is_same_v<scalar_t, double> ? 3 : 4;
constexpr int kFinishThreads = 256;
constexpr int kRangeSums = 4;

// A block keeps copies of small histograms, so that its warps do not wait for each other.
constexpr int kCopiesBytes = 16 * 1024;
constexpr int kMaxCopies = 8;

// One variable of one problem.
template <typename acc_t>
struct Axis {
  acc_t low;
  acc_t width;
  acc_t per_unit;  // bins
  int bins;
};

template <typename acc_t>
__device__ __forceinline__ Axis<acc_t> load_axis(const void* ranges, int64_t problem, int bins) {
  const acc_t* range = static_cast<const acc_t*>(ranges) + 2 * problem;
  const acc_t width = range[1] - range[0];
  return {range[0], width, static_cast<acc_t>(bins - 1) / width, bins};
}

// A value's place: the lower of its two bins, always one that exists, and the upper one's share.
template <typename acc_t>
struct Position {
  acc_t t;  // NaN if the value has no place
  acc_t share;
  int lower;
};

template <typename acc_t>
__device__ __forceinline__ Position<acc_t> position_of(const Axis<acc_t>& axis, acc_t x) {
  const acc_t last = static_cast<acc_t>(axis.bins - 1);
  acc_t t = mul_rn(x - axis.low, axis.per_unit);
  t = t < acc_t(0) ? acc_t(0) : t > last ? last : t;
  const int whole = t > acc_t(0) ? static_cast<int>(t) : 0;
  const int lower = whole < axis.bins - 2 ? whole : axis.bins - 2;
  return {t, t - static_cast<acc_t>(lower), lower};
}

// Shared by all blocks of a launch.
struct SoftGrid {
  int64_t parts;
  int64_t chunk;
  int copies;  // of the histogram in shared memory; 0: it does not fit
};

// True if this thread's element j of the tile counts.
template <bool kVector>
__device__ __forceinline__ bool is_present(const SoftRows& rows, const RowPart& part, int tile,
                                           int j) {
  return rows.present[part.begin + tile_index<kVector, kThreads>(tile, j)];
}

// Block x shares out one part of one problem. kWhole: the part is the problem.
template <typename scalar_t, bool kVector, bool kWhole, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    soft_histogram_kernel(const SoftHistogramParams __grid_constant__ params,
                          const SoftGrid __grid_constant__ grid) {
  using acc_t = acc_type<scalar_t>;
  using shares = Shares<acc_t>;
  using sum_t = typename shares::sum_t;
  const SoftRows& rows = params.rows;
  const int bins = rows.bins;
  const int cells = bins * bins;
  __shared__ bool broken;
  uint32_t* const table = dynamic_shared<uint32_t>();
  const int table_words = shares::kWords * cells;
  for (int i = threadIdx.x; i < grid.copies * table_words; i += kThreads) table[i] = 0;
  if (threadIdx.x == 0) broken = false;
  __syncthreads();
  const RowPart part = row_part(blockIdx.x, grid.parts, grid.chunk, rows.columns);
  const Axis<acc_t> x_axis = load_axis<acc_t>(rows.x_range, part.problem, bins);
  const Axis<acc_t> y_axis = load_axis<acc_t>(rows.y_range, part.problem, bins);
  const scalar_t* x_part = static_cast<const scalar_t*>(rows.x) + part.begin;
  const scalar_t* y_part = static_cast<const scalar_t*>(rows.y) + part.begin;
  constexpr int kSums = kSumWords<acc_t>;
  Sum* const sums = static_cast<Sum*>(params.sums) + part.problem * (kSums * cells + 1);
  const int copy = grid.copies > 1 ? threadIdx.x / kWarpSize % grid.copies : 0;
  uint32_t* const mine = table + copy * table_words;
  for (int tile = 0; tile < part.elements; tile += kRowPack * kThreads) {
    const int count = tile_count<kVector, kThreads>(tile, part.elements);
    acc_t x[kRowPack], y[kRowPack];
    load_tile<kVector, kThreads>(x_part, tile, count, x);
    load_tile<kVector, kThreads>(y_part, tile, count, y);
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j >= count) continue;
      if (kMasked && !is_present<kVector>(rows, part, tile, j)) continue;
      const Position<acc_t> px = position_of(x_axis, x[j]);
      const Position<acc_t> py = position_of(y_axis, y[j]);
      if (px.t != px.t || py.t != py.t) {
        set_flag(&broken, true);
        continue;
      }
      const int cell = px.lower * bins + py.lower;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const acc_t share = (k / 2 == 0 ? acc_t(1) - px.share : px.share) *
                            (k % 2 == 0 ? acc_t(1) - py.share : py.share);
        const int target = cell + k / 2 * bins + k % 2;
        if (kWhole || grid.copies > 0) {
          shares::add(mine + target, cells, share);
        } else {
          shares::add(sums + kSums * target, share);
        }
      }
    }
  }
  __syncthreads();
  if (!kWhole && threadIdx.x == 0 && broken) {
    // A mark that nothing is added to but other marks.
    atomicAdd(sums + kSums * cells, Sum(1));
  }
  if (grid.copies == 0) return;
  for (int i = threadIdx.x; i < cells; i += kThreads) {
    sum_t sum{};
    for (int c = 0; c < grid.copies; ++c) {
      sum += shares::load(table + c * table_words + i, cells);
    }
    if constexpr (kWhole) {
      static_cast<acc_t*>(params.weights)[part.problem * cells + i] =
          broken ? static_cast<acc_t>(NAN) : shares::value(sum);
    } else {
      shares::add(sums + kSums * i, sum);
    }
  }
}

// Rounds what the blocks have added up.
template <typename acc_t>
__global__ void __launch_bounds__(kFinishThreads)
    soft_histogram_finish_kernel(const SoftHistogramParams __grid_constant__ params) {
  using shares = Shares<acc_t>;
  const int cells = params.rows.bins * params.rows.bins;
  for (int64_t problem = blockIdx.y; problem < params.rows.problems; problem += gridDim.y) {
    const Sum* sums =
        static_cast<const Sum*>(params.sums) + problem * (kSumWords<acc_t> * cells + 1);
    acc_t* weights = static_cast<acc_t*>(params.weights) + problem * cells;
    const int i = blockIdx.x * kFinishThreads + threadIdx.x;
    if (i >= cells) continue;
    const bool broken = sums[kSumWords<acc_t> * cells] != 0;
    weights[i] =
        broken ? static_cast<acc_t>(NAN) : shares::value(shares::load(sums + kSumWords<acc_t> * i));
  }
}

// One value's slopes from the four cells around it.
template <typename acc_t>
__device__ __forceinline__ void slopes_of(const acc_t* grad, int bins, const Position<acc_t>& x,
                                          const Position<acc_t>& y, acc_t* by_x, acc_t* by_y) {
  const acc_t* cell = grad + x.lower * bins + y.lower;
  const acc_t g00 = cell[0];
  const acc_t g01 = cell[1];
  const acc_t g10 = cell[bins];
  const acc_t g11 = cell[bins + 1];
  *by_x = (acc_t(1) - y.share) * (g10 - g00) + y.share * (g11 - g01);
  *by_y = (acc_t(1) - x.share) * (g01 - g00) + x.share * (g11 - g10);
}

// Stores the gradients of a problem's ranges from its four sums.
template <typename acc_t>
__device__ __forceinline__ void store_range_grads(const SoftHistogramBackwardParams& params,
                                                  int64_t problem,
                                                  const double (&sums)[kRangeSums]) {
  for (int k = 0; k < 2; ++k) {
    const void* ranges = k == 0 ? params.rows.x_range : params.rows.y_range;
    const double width = load_axis<acc_t>(ranges, problem, params.rows.bins).width;
    acc_t* out = static_cast<acc_t*>(k == 0 ? params.grad_x_range : params.grad_y_range);
    out[2 * problem] = static_cast<acc_t>(sums[2 * k] / width);
    out[2 * problem + 1] = static_cast<acc_t>(-sums[2 * k + 1] / width);
  }
}

// Block x finds the gradients of one part of one problem, reading the table of slopes from shared
// memory if that pays.
template <typename scalar_t, bool kVector, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    soft_histogram_backward_kernel(const SoftHistogramBackwardParams __grid_constant__ params,
                                   const SoftGrid __grid_constant__ grid) {
  using acc_t = acc_type<scalar_t>;
  const SoftRows& rows = params.rows;
  const int bins = rows.bins;
  const int cells = bins * bins;
  const acc_t last = static_cast<acc_t>(bins - 1);
  const RowPart part = row_part(blockIdx.x, grid.parts, grid.chunk, rows.columns);
  const acc_t* grad = static_cast<const acc_t*>(params.grad) + part.problem * cells;
  if (grid.copies > 0) {
    acc_t* const table = dynamic_shared<acc_t>();
    for (int i = threadIdx.x; i < cells; i += kThreads) table[i] = grad[i];
    __syncthreads();
    grad = table;
  }
  const Axis<acc_t> x_axis = load_axis<acc_t>(rows.x_range, part.problem, bins);
  const Axis<acc_t> y_axis = load_axis<acc_t>(rows.y_range, part.problem, bins);
  const scalar_t* x_part = static_cast<const scalar_t*>(rows.x) + part.begin;
  const scalar_t* y_part = static_cast<const scalar_t*>(rows.y) + part.begin;
  double sums[kRangeSums] = {};
  for (int tile = 0; tile < part.elements; tile += kRowPack * kThreads) {
    const int count = tile_count<kVector, kThreads>(tile, part.elements);
    acc_t x[kRowPack], y[kRowPack];
    load_tile<kVector, kThreads>(x_part, tile, count, x);
    load_tile<kVector, kThreads>(y_part, tile, count, y);
    acc_t batch[kRangeSums] = {};
#pragma unroll
    for (int j = 0; j < kRowPack; ++j) {
      if (j >= count) continue;
      if (kMasked && !is_present<kVector>(rows, part, tile, j)) {
        x[j] = y[j] = acc_t(0);
        continue;
      }
      const Position<acc_t> px = position_of(x_axis, x[j]);
      const Position<acc_t> py = position_of(y_axis, y[j]);
      acc_t by_x, by_y;
      slopes_of(grad, bins, px, py, &by_x, &by_y);
      batch[0] += by_x * (px.t - last);
      batch[1] += by_x * px.t;
      batch[2] += by_y * (py.t - last);
      batch[3] += by_y * py.t;
      x[j] = by_x * x_axis.per_unit;
      y[j] = by_y * y_axis.per_unit;
    }
#pragma unroll
    for (int k = 0; k < kRangeSums; ++k) sums[k] += static_cast<double>(batch[k]);
    store_tile<kVector, kThreads>(static_cast<scalar_t*>(params.grad_x) + part.begin, tile, count,
                                  x);
    store_tile<kVector, kThreads>(static_cast<scalar_t*>(params.grad_y) + part.begin, tile, count,
                                  y);
  }
  block_sum<kThreads>(sums);
  if (threadIdx.x != 0) return;
  if (grid.parts == 1) return store_range_grads<acc_t>(params, part.problem, sums);
  double* out = params.partials + kRangeSums * static_cast<int64_t>(blockIdx.x);
  for (int k = 0; k < kRangeSums; ++k) out[k] = sums[k];
}

// Block x adds up the parts of one problem.
template <typename acc_t>
__global__ void __launch_bounds__(kFinishThreads)
    soft_histogram_range_grads_kernel(const SoftHistogramBackwardParams __grid_constant__ params,
                                      int64_t parts) {
  double sums[kRangeSums] = {};
  const double* partials = params.partials + kRangeSums * parts * blockIdx.x;
  for (int64_t i = threadIdx.x; i < parts; i += kFinishThreads) {
#pragma unroll
    for (int k = 0; k < kRangeSums; ++k) sums[k] += partials[kRangeSums * i + k];
  }
  block_sum<kFinishThreads>(sums);
  if (threadIdx.x == 0) store_range_grads<acc_t>(params, blockIdx.x, sums);
}

SoftGrid soft_grid(const SoftRows& rows) {
  SoftGrid grid{};
  grid.chunk = soft_chunk(rows);
  grid.parts = chunk_count(rows.columns, grid.chunk);
  return grid;
}

// Shared memory of one copy of the histogram.
int table_bytes(const SoftRows& rows) {
  const int words = rows.dtype == DType::kFloat64 ? Shares<double>::kWords : Shares<float>::kWords;
  return rows.bins * rows.bins * words * static_cast<int>(sizeof(uint32_t));
}

bool is_vector(const SoftRows& rows) {
  return rows_aligned(rows.problems, rows.columns) && is_aligned(rows.x) && is_aligned(rows.y);
}

template <typename scalar_t, bool kMasked>
auto histogram_kernel_of(bool vector, bool whole) {
  return whole    ? vector ? soft_histogram_kernel<scalar_t, true, true, kMasked>
                           : soft_histogram_kernel<scalar_t, false, true, kMasked>
         : vector ? soft_histogram_kernel<scalar_t, true, false, kMasked>
                  : soft_histogram_kernel<scalar_t, false, false, kMasked>;
}

// Values with a mask have been widened before.
template <typename scalar_t>
auto histogram_kernel(const SoftRows& rows, bool vector, bool whole) {
  if constexpr (std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    if (rows.present != nullptr) return histogram_kernel_of<scalar_t, true>(vector, whole);
  }
  return histogram_kernel_of<scalar_t, false>(vector, whole);
}

template <typename scalar_t>
auto backward_kernel(const SoftRows& rows, bool vector) {
  if constexpr (std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    if (rows.present != nullptr) {
      return vector ? soft_histogram_backward_kernel<scalar_t, true, true>
                    : soft_histogram_backward_kernel<scalar_t, false, true>;
    }
  }
  return vector ? soft_histogram_backward_kernel<scalar_t, true, false>
                : soft_histogram_backward_kernel<scalar_t, false, false>;
}

}  // namespace

bool block_per_problem(const SoftRows& rows) {
  return soft_grid(rows).parts == 1 && table_bytes(rows) <= max_shared_bytes();
}

void launch_soft_histogram(const SoftHistogramParams& params, cudaStream_t stream) {
  const SoftRows& rows = params.rows;
  if (rows.problems == 0) return;
  SoftGrid grid = soft_grid(rows);
  const int cells = rows.bins * rows.bins;
  const int bytes = table_bytes(rows);
  const bool whole = block_per_problem(rows);
  if (bytes <= max_shared_bytes()) {
    grid.copies = 1;
    while (grid.copies < kMaxCopies && 2 * grid.copies * bytes <= kCopiesBytes &&
           2 * grid.copies * cells <= std::min(grid.chunk, rows.columns) / 4) {
      grid.copies *= 2;
    }
  }
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    const bool vector = is_vector(rows);
    if (grid.parts > 0) {
      launch_shared("soft_histogram_kernel", histogram_kernel<scalar_t>(rows, vector, whole),
                    static_cast<unsigned>(rows.problems * grid.parts), kThreads,
                    grid.copies * bytes, stream, params, grid);
    }
    if (whole) return;
    const dim3 blocks(static_cast<unsigned>(chunk_count(cells, kFinishThreads)),
                      static_cast<unsigned>(std::min<int64_t>(rows.problems, 65535)));
    launch("soft_histogram_finish_kernel", soft_histogram_finish_kernel<acc_t>, blocks,
           kFinishThreads, stream, params);
  });
}

void launch_soft_histogram_backward(const SoftHistogramBackwardParams& params,
                                    cudaStream_t stream) {
  const SoftRows& rows = params.rows;
  if (rows.problems == 0) return;
  SoftGrid grid = soft_grid(rows);
  const int cells = rows.bins * rows.bins;
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    const int bytes = cells * static_cast<int>(sizeof(acc_t));
    grid.copies = bytes <= kFreeSharedBytes && cells <= std::min(grid.chunk, rows.columns) ? 1 : 0;
    const bool vector = is_vector(rows) && is_aligned(params.grad_x) && is_aligned(params.grad_y);
    if (grid.parts > 0) {
      launch_shared("soft_histogram_backward_kernel", backward_kernel<scalar_t>(rows, vector),
                    static_cast<unsigned>(rows.problems * grid.parts), kThreads,
                    grid.copies * bytes, stream, params, grid);
    }
    if (grid.parts == 1) return;
    launch("soft_histogram_range_grads_kernel", soft_histogram_range_grads_kernel<acc_t>,
           static_cast<unsigned>(rows.problems), kFinishThreads, stream, params, grid.parts);
  });
}

}  // namespace mmfuse::cuda
