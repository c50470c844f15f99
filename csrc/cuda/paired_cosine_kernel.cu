#include <math.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/partial_sums.h"
#include "paired_cosine.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kMaxPairs = 64;
// The norm at which torch.nn.functional.normalize stops dividing.
constexpr double kMinNorm = 1e-12;

// Packs of each tensor that a thread has in flight; fewer where the row comes from the cache and
// slopes need the registers.
template <int kPack>
constexpr int kSumBatch = kPack == 1 ? 8 : 4;
template <int kPack>
constexpr int kSlopeBatch = kSumBatch<kPack> / (kPack == 8 ? 4 : 2);

// The pairs that one launch handles, and the shape that they share.
struct PairTable {
  int64_t rows;
  int64_t columns;
  int64_t rows_per_block;
  double* partials;
  CosinePair pairs[kMaxPairs];
};

// The sums that a row's cosine and its gradient are made of.
template <typename acc_t>
struct RowCosine {
  acc_t norm_a;  // not yet clamped
  acc_t norm_b;
  acc_t cosine;
};

// This also keeps a NaN.
template <typename acc_t>
__device__ __forceinline__ acc_t clamp_norm(acc_t norm) {
  return norm < static_cast<acc_t>(kMinNorm) ? static_cast<acc_t>(kMinNorm) : norm;
}

// The sums over the kTeam threads that share a row, in each of them.
template <int kTeam, int kCount, typename acc_t>
__device__ __forceinline__ void team_sum(acc_t (&values)[kCount]) {
  if constexpr (kTeam == kWarpSize) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = warp_sum(values[k]);
  } else {
    block_sum<kTeam>(values);
  }
}

// Calls f(first element, packs of a, packs of b) for this thread's batches of a row.
template <int kPack, int kBatch, int kTeam, typename scalar_t, typename F>
__device__ __forceinline__ void for_each_batch(const scalar_t* a, const scalar_t* b,
                                               int64_t columns, const F& f) {
  constexpr int kStride = kTeam * kPack;
  for (int64_t c = threadIdx.x % kTeam * kPack; c < columns; c += kBatch * kStride) {
    Pack<scalar_t, kPack> x[kBatch] = {};
    Pack<scalar_t, kPack> y[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (c + u * kStride < columns) {
        x[u] = load_pack<true, kPack>(a + c + u * kStride);
        y[u] = load_pack<true, kPack>(b + c + u * kStride);
      }
    }
    f(c, x, y);
  }
}

template <int kPack, int kTeam, typename scalar_t>
__device__ __forceinline__ RowCosine<acc_type<scalar_t>> row_cosine(const scalar_t* a,
                                                                    const scalar_t* b,
                                                                    int64_t columns) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kBatch = kSumBatch<kPack>;
  acc_t sums[3] = {};
  for_each_batch<kPack, kBatch, kTeam>(a, b, columns, [&](int64_t, const auto& x, const auto& y) {
    // Adding batch by batch keeps long rows accurate.
    acc_t batch[3] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const acc_t xj = widen<acc_t>(x[u].v[j]);
        const acc_t yj = widen<acc_t>(y[u].v[j]);
        batch[0] += xj * yj;
        batch[1] += xj * xj;
        batch[2] += yj * yj;
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += batch[k];
  });
  team_sum<kTeam>(sums);
  const acc_t norm_a = sqrt(sums[1]);
  const acc_t norm_b = sqrt(sums[2]);
  return {norm_a, norm_b, sums[0] / (clamp_norm(norm_a) * clamp_norm(norm_b))};
}

// Block (x, p) adds up the cosines of its rows of pair p.
template <typename scalar_t, int kPack, int kTeam>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cosine_sums_kernel(const PairTable __grid_constant__ table) {
  constexpr int kTeams = kThreads / kTeam;
  const CosinePair& pair = table.pairs[blockIdx.y];
  const scalar_t* a = static_cast<const scalar_t*>(pair.a);
  const scalar_t* b = static_cast<const scalar_t*>(pair.b);
  const int64_t begin = blockIdx.x * table.rows_per_block;
  const int64_t end =
      begin + table.rows_per_block < table.rows ? begin + table.rows_per_block : table.rows;
  double sum[1] = {0};
  for (int64_t row = begin + threadIdx.x / kTeam; row < end; row += kTeams) {
    const int64_t first = row * table.columns;
    const auto result = row_cosine<kPack, kTeam>(a + first, b + first, table.columns);
    if (threadIdx.x % kTeam == 0) sum[0] += result.cosine;
  }
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    table.partials[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum[0];
  }
}

// kTeam threads write a row of both gradients; the second look at the row finds it in the cache.
template <typename scalar_t, int kPack, int kTeam>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    paired_cosine_backward_kernel(const PairedCosineBackwardParams __grid_constant__ params) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kTeams = kThreads / kTeam;
  constexpr int kBatch = kSlopeBatch<kPack>;
  const acc_t grad = load_coefficient<acc_t>(params.grad, 0) / static_cast<acc_t>(params.rows);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTeams;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  for (; row < params.rows; row += step) {
    const int64_t first = row * params.columns;
    const scalar_t* a = static_cast<const scalar_t*>(params.pair.a) + first;
    const scalar_t* b = static_cast<const scalar_t*>(params.pair.b) + first;
    scalar_t* grad_a = static_cast<scalar_t*>(params.grad_a) + first;
    scalar_t* grad_b = static_cast<scalar_t*>(params.grad_b) + first;
    const auto result = row_cosine<kPack, kTeam>(a, b, params.columns);
    const acc_t inverse_a = acc_t(1) / clamp_norm(result.norm_a);
    const acc_t inverse_b = acc_t(1) / clamp_norm(result.norm_b);
    const acc_t scale_a = grad * inverse_a;
    const acc_t scale_b = grad * inverse_b;
    // A zero row has no direction to turn from, whatever the other one is.
    const bool zero_a = result.norm_a <= static_cast<acc_t>(kMinNorm);
    const bool zero_b = result.norm_b <= static_cast<acc_t>(kMinNorm);
    for_each_batch<kPack, kBatch, kTeam>(a, b, params.columns, [&](int64_t c, auto& x, auto& y) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t column = c + u * kTeam * kPack;
        if (column >= params.columns) continue;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const acc_t unit_a = widen<acc_t>(x[u].v[j]) * inverse_a;
          const acc_t unit_b = widen<acc_t>(y[u].v[j]) * inverse_b;
          const acc_t slope_a = (unit_b - result.cosine * unit_a) * scale_a;
          const acc_t slope_b = (unit_a - result.cosine * unit_b) * scale_b;
          x[u].v[j] = round_to<scalar_t>(zero_a ? acc_t(0) : slope_a);
          y[u].v[j] = round_to<scalar_t>(zero_b ? acc_t(0) : slope_b);
        }
        store_pack<true>(grad_a + column, x[u]);
        store_pack<true>(grad_b + column, y[u]);
      }
    });
  }
}

struct StoreCosine {
  void* cosine;
  int64_t rows;
  bool wide;

  __device__ void operator()(double sum) const {
    // 0 / 0 without a row.
    store_result(cosine, wide, sum / static_cast<double>(rows));
  }
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f(elements read at once, threads that share a row).
template <typename scalar_t, typename F>
void visit_layout(int64_t rows, int64_t columns, bool aligned, const F& f) {
  constexpr int kPack = kVectorBytes / sizeof(scalar_t);
  const bool vector = aligned && columns % kPack == 0;
  if (block_per_row(rows, columns)) {
    vector ? f(Constant<kPack>{}, Constant<kThreads>{}) : f(Constant<1>{}, Constant<kThreads>{});
  } else {
    vector ? f(Constant<kPack>{}, Constant<kWarpSize>{}) : f(Constant<1>{}, Constant<kWarpSize>{});
  }
}

}  // namespace

void launch_cosine_sums(const CosineSumsParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;
  const int64_t blocks = cosine_blocks(params.rows, params.columns);
  const bool aligned =
      std::all_of(params.pairs.begin(), params.pairs.end(),
                  [](const CosinePair& pair) { return is_aligned(pair.a) && is_aligned(pair.b); });
  PairTable table;
  table.rows = params.rows;
  table.columns = params.columns;
  table.rows_per_block = cosine_rows(params.rows, params.columns);
  const int64_t total = static_cast<int64_t>(params.pairs.size());
  for (int64_t first = 0; first < total; first += kMaxPairs) {
    const int64_t count = std::min<int64_t>(total - first, kMaxPairs);
    std::copy_n(params.pairs.begin() + first, count, table.pairs);
    table.partials = params.partials + first * blocks;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    visit_dtype(params.dtype, [&](auto* type) {
      using scalar_t = std::remove_pointer_t<decltype(type)>;
      visit_layout<scalar_t>(params.rows, params.columns, aligned, [&](auto pack, auto team) {
        launch("cosine_sums_kernel", cosine_sums_kernel<scalar_t, pack.value, team.value>, grid,
               kThreads, stream, table);
      });
    });
  }
}

void launch_paired_cosine(const PairedCosineParams& params, cudaStream_t stream) {
  const CosineSumsParams& sums = params.sums;
  launch_cosine_sums(sums, stream);
  launch_partial_sums(sums.partials, cosine_blocks(sums.rows, sums.columns),
                      StoreCosine{params.cosine, sums.rows, sums.dtype == DType::kFloat64}, stream);
}

void launch_paired_cosine_backward(const PairedCosineBackwardParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.columns == 0) return;
  const bool aligned = is_aligned(params.pair.a) && is_aligned(params.pair.b) &&
                       is_aligned(params.grad_a) && is_aligned(params.grad_b);
  visit_dtype(params.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    visit_layout<scalar_t>(params.rows, params.columns, aligned, [&](auto pack, auto team) {
      constexpr int kTeams = kThreads / team.value;
      launch("paired_cosine_backward_kernel",
             paired_cosine_backward_kernel<scalar_t, pack.value, team.value>,
             resident_blocks(chunk_count(params.rows, kTeams), kBlocksPerSm), kThreads, stream,
             params);
    });
  });
}

}  // namespace mmfuse::cuda
