#include <math.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/score_rows.h"
#include "logit_divergence.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
// Said aloud, or the compiler would spill for more.
constexpr int kBlocksPerSm = 2;
constexpr int kBackwardThreads = 256;
constexpr int kBackwardBlocksPerSm = 2;
constexpr int kMaxPairs = 16;

// The pairs from `first` on that one launch handles.
template <typename common_t>
struct PairTable {
  common_t common;
  int first;
  LogitPair pairs[kMaxPairs];
};

struct DivergenceOutputs {
  int64_t rows;
  bool per_row;
  double* workspace;
  void* value;
  void* numbers;
  bool wide;
};

struct DivergenceGradients {
  int64_t rows;
  bool per_row;
  Coefficients grad;
  Coefficients numbers;
};

// Both softmaxes of a row, and with them p, q and ln p - ln q of a class.
template <typename acc_t>
struct PairSoftmax {
  RowSoftmax<acc_t> a;
  RowSoftmax<acc_t> b;
};

// The parts of the terms that depend on d = ln p - ln q, besides its sign.
template <typename acc_t>
struct LogRatio {
  acc_t size;
  acc_t e;         // exp(-size)
  acc_t log_cosh;  // ln cosh(d / 2)
  acc_t nearer;    // ln(max(p, q) / m)
  bool near;       // where the logarithms would be differences of larger numbers
};

template <typename acc_t>
__device__ __forceinline__ LogRatio<acc_t> log_ratio(acc_t d) {
  constexpr acc_t kLog2 = static_cast<acc_t>(0.693147180559945309);
  LogRatio<acc_t> ratio;
  ratio.size = fabs(d);
  ratio.e = exp(-ratio.size);
  ratio.near = ratio.size < acc_t(1);
  const acc_t sinh_sq = (1 - ratio.e) * (1 - ratio.e) / (4 * ratio.e);
  const acc_t r = log1p(ratio.near ? sinh_sq : ratio.e);
  const acc_t x = ratio.size / 2;
  ratio.log_cosh = ratio.near ? r / 2 : x - (kLog2 - r);
  ratio.nearer = ratio.near ? x - ratio.log_cosh : kLog2 - r;
  return ratio;
}

// The term of m in the Jensen-Shannon divergence.
template <typename acc_t>
__device__ __forceinline__ acc_t js_of(const LogRatio<acc_t>& ratio) {
  const acc_t close = ratio.size / 2 * ((1 - ratio.e) / (1 + ratio.e)) - ratio.log_cosh;
  return ratio.near ? close : ratio.nearer - shared(ratio.e, ratio.size) / (1 + ratio.e);
}

// Half of ln(p / m) if p is the larger one, else of the smaller one.
template <typename acc_t>
__device__ __forceinline__ acc_t half_of(const LogRatio<acc_t>& ratio, bool larger) {
  return (larger ? ratio.nearer : ratio.nearer - ratio.size) / 2;
}

template <typename acc_t>
__device__ __forceinline__ acc_t kl_term(acc_t p, acc_t q, acc_t d) {
  return fabs(d) < acc_t(1) ? p * (d + expm1(-d)) : shared(p, d) - p + q;
}

// ln p - ln q from logits less their maxima.
template <typename acc_t>
__device__ __forceinline__ acc_t ratio_of(const PairSoftmax<acc_t>& softmax, acc_t a, acc_t b) {
  return (a - b) - (softmax.a.log_sum - softmax.b.log_sum);
}

// Max and log-sum of a row of `classes` logits, by a warp.
template <typename scalar_t>
__device__ __forceinline__ RowSoftmax<acc_type<scalar_t>> softmax_of(const scalar_t* x,
                                                                     int classes) {
  const LogitRow<scalar_t> row{x, nullptr, 1, 1, 0, classes, true};
  return sum_row<WarpTeam<kThreads>, false>(ScoreTargets{}, row).softmax;
}

template <DivergenceKind kKind, typename acc_t>
struct RowSums {
  acc_t value = 0, under_p = 0, under_q = 0;

  __device__ __forceinline__ void add(acc_t p, acc_t q, acc_t d) {
    if constexpr (kKind == DivergenceKind::kKl) {
      value += kl_term(p, q, d);
    } else {
      const LogRatio<acc_t> ratio = log_ratio(d);
      if constexpr (kKind == DivergenceKind::kMixture) {
        under_p += shared(p, ratio.log_cosh);
        under_q += shared(q, ratio.log_cosh);
      } else {
        value += shared((p + q) / 2, js_of(ratio));
        under_p += shared(p, half_of(ratio, d >= 0));
        under_q += shared(q, half_of(ratio, d < 0));
      }
    }
  }

  // Over the warp.
  __device__ __forceinline__ void finish() {
    value = warp_sum(value);
    under_p = warp_sum(under_p);
    under_q = warp_sum(under_q);
    if constexpr (kKind == DivergenceKind::kKl) under_p = value;
    if constexpr (kKind == DivergenceKind::kMixture) value = (under_p + under_q) / 2;
  }
};

// The divergence of a row by a warp, whose first lane writes its numbers.
template <DivergenceKind kKind, typename scalar_t>
__device__ __forceinline__ double row_divergence(const DivergenceOutputs& call,
                                                 const LogitPair& pair, int k, int64_t row) {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* a = static_cast<const scalar_t*>(pair.first) + row * pair.first_stride;
  const scalar_t* b = static_cast<const scalar_t*>(pair.second) + row * pair.second_stride;
  const PairSoftmax<acc_t> softmax{softmax_of(a, pair.classes), softmax_of(b, pair.classes)};
  RowSums<kKind, acc_t> sums;
  const int lane = threadIdx.x % kWarpSize;
  for (int c = lane; c < pair.classes; c += kWarpSize) {
    const acc_t x = widen<acc_t>(a[c]) - softmax.a.max, y = widen<acc_t>(b[c]) - softmax.b.max;
    sums.add(exp(x - softmax.a.log_sum), exp(y - softmax.b.log_sum), ratio_of(softmax, x, y));
  }
  sums.finish();
  if (lane == 0) {
    const acc_t numbers[kRowNumbers] = {softmax.a.max,     softmax.b.max, softmax.a.log_sum,
                                        softmax.b.log_sum, sums.under_p,  sums.under_q};
    for (int i = 0; i < kRowNumbers; ++i) {
      store_result(call.numbers, call.wide, numbers[i], (k * kRowNumbers + i) * call.rows + row);
    }
  }
  return sums.value;
}

// Block (x, k) handles kDivergenceRows rows of pair k.
template <DivergenceKind kKind>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    logit_divergence_kernel(const PairTable<DivergenceOutputs> __grid_constant__ table) {
  const DivergenceOutputs& call = table.common;
  const LogitPair& pair = table.pairs[blockIdx.y];
  const int64_t k = table.first + blockIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDivergenceRows;
  const int64_t left = call.rows - first,
                end = first + (left < kDivergenceRows ? left : kDivergenceRows);
  double sum[1] = {0};
  visit_dtype(pair.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
#pragma unroll 1
    for (int64_t row = first + threadIdx.x / kWarpSize; row < end; row += kThreads / kWarpSize) {
      const double value = row_divergence<kKind, scalar_t>(call, pair, k, row);
      if (threadIdx.x % kWarpSize != 0) continue;
      sum[0] += value;
      if (call.per_row) store_result(call.value, call.wide, value, k * call.rows + row);
    }
  });
  if (call.per_row) return;
  block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    // Without a row this is 0 / 0.
    store_result(call.value, call.wide, sum[0] / call.rows, k);
  } else {
    call.workspace[k * gridDim.x + blockIdx.x] = sum[0];
  }
}

// Block k adds the partial sums of pair k.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    logit_divergence_finalise_kernel(const DivergenceOutputs __grid_constant__ call, int blocks) {
  const double* partial = call.workspace + static_cast<int64_t>(blockIdx.x) * blocks;
  double sum[1] = {0};
  for (int block = threadIdx.x; block < blocks; block += kThreads) sum[0] += partial[block];
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) store_result(call.value, call.wide, sum[0] / call.rows, blockIdx.x);
}

// The derivatives of a class's terms, from the row's means.
template <DivergenceKind kKind, typename acc_t>
__device__ __forceinline__ void slopes(acc_t p, acc_t q, acc_t d, acc_t under_p, acc_t under_q,
                                       acc_t& to_a, acc_t& to_b) {
  if constexpr (kKind == DivergenceKind::kKl) {
    to_a = shared(p, d - under_p);
    to_b = q - p;
  } else {
    const LogRatio<acc_t> ratio = log_ratio(d);
    if constexpr (kKind == DivergenceKind::kMixture) {
      const acc_t quarter = (p - q) / 4;
      to_a = shared(p, ratio.log_cosh - under_p) / 2 + quarter;
      to_b = shared(q, ratio.log_cosh - under_q) / 2 - quarter;
    } else {
      to_a = shared(p, half_of(ratio, d >= 0) - under_p);
      to_b = shared(q, half_of(ratio, d < 0) - under_q);
    }
  }
}

// Blocks (:, k) write the gradients of pair k, a warp those of a row.
template <DivergenceKind kKind>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm)
    logit_divergence_backward_kernel(const PairTable<DivergenceGradients> __grid_constant__ table) {
  const DivergenceGradients& call = table.common;
  const LogitPair& pair = table.pairs[blockIdx.y];
  visit_dtype(pair.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    constexpr int kWarps = kBackwardThreads / kWarpSize;
    const int64_t k = table.first + blockIdx.y;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 1
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
         row < call.rows; row += step) {
      const auto number = [&](int i) {
        return load_coefficient<acc_t>(call.numbers, (k * kRowNumbers + i) * call.rows + row);
      };
      const PairSoftmax<acc_t> softmax{{number(0), number(2)}, {number(1), number(3)}};
      const acc_t under_p = number(4), under_q = number(5);
      const acc_t weight = call.per_row ? load_coefficient<acc_t>(call.grad, k * call.rows + row)
                                        : load_coefficient<acc_t>(call.grad, k) / acc_t(call.rows);
      const scalar_t* a = static_cast<const scalar_t*>(pair.first) + row * pair.first_stride;
      const scalar_t* b = static_cast<const scalar_t*>(pair.second) + row * pair.second_stride;
      const int64_t place = row * pair.classes;
      for (int c = threadIdx.x % kWarpSize; c < pair.classes; c += kWarpSize) {
        const acc_t x = widen<acc_t>(a[c]) - softmax.a.max, y = widen<acc_t>(b[c]) - softmax.b.max;
        acc_t to_a, to_b;
        slopes<kKind>(exp(x - softmax.a.log_sum), exp(y - softmax.b.log_sum),
                      ratio_of(softmax, x, y), under_p, under_q, to_a, to_b);
        if (pair.grad_first != nullptr) {
          static_cast<scalar_t*>(pair.grad_first)[place + c] = round_to<scalar_t>(weight * to_a);
        }
        if (pair.grad_second != nullptr) {
          static_cast<scalar_t*>(pair.grad_second)[place + c] = round_to<scalar_t>(weight * to_b);
        }
      }
    }
  });
}

// Calls start(table, how many pairs it holds) until all have been handled.
template <typename common_t, typename F>
void for_each_table(const std::vector<LogitPair>& pairs, const common_t& common, const F& start) {
  PairTable<common_t> table;
  table.common = common;
  const int total = static_cast<int>(pairs.size());
  for (table.first = 0; table.first < total; table.first += kMaxPairs) {
    const int count = std::min(total - table.first, kMaxPairs);
    std::copy_n(pairs.begin() + table.first, count, table.pairs);
    start(table, static_cast<unsigned>(count));
  }
}

// f(kind as a type)
template <typename F>
void visit_kind(DivergenceKind kind, const F& f) {
  switch (kind) {
    case DivergenceKind::kKl:
      return f(std::integral_constant<DivergenceKind, DivergenceKind::kKl>{});
    case DivergenceKind::kMixture:
      return f(std::integral_constant<DivergenceKind, DivergenceKind::kMixture>{});
    case DivergenceKind::kJs:
      return f(std::integral_constant<DivergenceKind, DivergenceKind::kJs>{});
  }
}

}  // namespace

void launch_logit_divergence(const LogitDivergenceParams& params, cudaStream_t stream) {
  if (params.per_row && params.rows == 0) return;
  const DivergenceOutputs common{params.rows,  params.per_row, params.workspace,
                                 params.value, params.numbers, params.wide};
  const unsigned blocks = static_cast<unsigned>(divergence_blocks(params.rows));
  visit_kind(params.kind, [&](auto kind) {
    for_each_table(params.pairs, common, [&](const auto& table, unsigned count) {
      launch("logit_divergence_kernel", logit_divergence_kernel<kind()>, dim3(blocks, count),
             kThreads, stream, table);
    });
  });
  if (blocks > 1 && !params.per_row) {
    launch("logit_divergence_finalise_kernel", logit_divergence_finalise_kernel,
           params.pairs.size(), kThreads, stream, common, static_cast<int>(blocks));
  }
}

void launch_logit_divergence_backward(const LogitDivergenceBackwardParams& params,
                                      cudaStream_t stream) {
  if (params.rows == 0) return;
  const DivergenceGradients common{params.rows, params.per_row, params.grad, params.numbers};
  constexpr int kWarps = kBackwardThreads / kWarpSize;
  const unsigned blocks =
      resident_blocks((params.rows + kWarps - 1) / kWarps, kBackwardBlocksPerSm);
  visit_kind(params.kind, [&](auto kind) {
    for_each_table(params.pairs, common, [&](const auto& table, unsigned count) {
      launch("logit_divergence_backward_kernel", logit_divergence_backward_kernel<kind()>,
             dim3(blocks, count), kBackwardThreads, stream, table);
    });
  });
}

}  // namespace mmfuse::cuda
