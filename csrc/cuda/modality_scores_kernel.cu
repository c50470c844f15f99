#include <math.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "modality_scores.h"

namespace mmfuse::cuda {
namespace {

constexpr int kScoreThreads = 1024;
constexpr int kBackwardThreads = 256;
constexpr int kBackwardBlocksPerSm = 3;
constexpr int kMaxModalities = 16;
constexpr int64_t kIgnoredLabel = -100;

// The modalities from `first` on that one launch handles.
template <typename common_t>
struct ModalityTable {
  common_t common;
  int first;
  ModalityLogits modalities[kMaxModalities];
};

struct ScoreOutputs {
  const int64_t* labels;
  int64_t rows;
  double* workspace;
  void* prob;
  void* log_prob;
  bool wide;
};

struct ScoreGradients {
  const int64_t* labels;
  int64_t rows;
  Coefficients grad_prob;
  Coefficients grad_log_prob;
};

// log softmax of class c is logits[c] - max - log_sum.
template <typename acc_t>
struct RowSoftmax {
  acc_t max;
  acc_t log_sum;
};

// exp(x - max), and 0 for x = -inf even while nothing larger has been seen.
template <typename acc_t>
__device__ __forceinline__ acc_t shifted_exp(acc_t x, acc_t max) {
  return exp(x - (max == static_cast<acc_t>(-INFINITY) ? acc_t(0) : max));
}

// One warp, one pass over a row: each lane rescales its sum when its maximum rises. Eight loads are
// in flight per lane, because a small batch waits for nothing else.
template <typename scalar_t>
__device__ __forceinline__ RowSoftmax<acc_type<scalar_t>> row_softmax(const scalar_t* row,
                                                                      int classes) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kBatch = std::is_same_v<acc_t, double> ? 2 : 8;
  acc_t max = static_cast<acc_t>(-INFINITY);
  acc_t sum = 0;
  for (int c = threadIdx.x % kWarpSize; c < classes; c += kBatch * kWarpSize) {
    acc_t x[kBatch];
    acc_t batch_max = max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool inside = c + u * kWarpSize < classes;
      x[u] = inside ? widen<acc_t>(row[c + u * kWarpSize]) : static_cast<acc_t>(-INFINITY);
      batch_max = x[u] > batch_max ? x[u] : batch_max;
    }
    sum *= shifted_exp(max, batch_max);
    max = batch_max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) sum += shifted_exp(x[u], max);
  }
  const acc_t row_max = warp_max(max);
  return {row_max, log(warp_sum(sum * shifted_exp(max, row_max)))};
}

// log softmax of the row's true class; NaN if there is no such class.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ acc_t true_log_prob(const scalar_t* row, int classes, int64_t label,
                                               const RowSoftmax<acc_t>& softmax) {
  if (label < 0 || label >= classes) return static_cast<acc_t>(NAN);
  return widen<acc_t>(row[label]) - softmax.max - softmax.log_sum;
}

__device__ __forceinline__ void store_scores(const ScoreOutputs& call, int m,
                                             const double (&sums)[kScoreSums]) {
  // Without a valid row this is 0 / 0.
  const double prob = sums[0] / sums[2];
  const double log_prob = sums[1] / sums[2];
  if (call.wide) {
    static_cast<double*>(call.prob)[m] = prob;
    static_cast<double*>(call.log_prob)[m] = log_prob;
  } else {
    static_cast<float*>(call.prob)[m] = static_cast<float>(prob);
    static_cast<float*>(call.log_prob)[m] = static_cast<float>(log_prob);
  }
}

// Block (x, m) sums kScoreRows rows of modality m, one warp per row.
__global__ void __launch_bounds__(kScoreThreads)
    modality_scores_kernel(const ModalityTable<ScoreOutputs> __grid_constant__ table) {
  const ScoreOutputs& call = table.common;
  const ModalityLogits& modality = table.modalities[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoreRows;
  const int64_t left = call.rows - first;
  const int rows = left < kScoreRows ? static_cast<int>(left) : kScoreRows;
  double sums[kScoreSums] = {};
  visit_dtype(modality.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    constexpr int kWarps = kScoreThreads / kWarpSize;
    const auto* logits = static_cast<const scalar_t*>(modality.logits) + first * modality.classes;
    for (int r = threadIdx.x / kWarpSize; r < rows; r += kWarps) {
      const int64_t label = call.labels[first + r];
      if (label == kIgnoredLabel) continue;
      const scalar_t* row = logits + static_cast<int64_t>(r) * modality.classes;
      const auto softmax = row_softmax(row, modality.classes);
      const auto log_prob = true_log_prob(row, modality.classes, label, softmax);
      if (threadIdx.x % kWarpSize == 0) {
        sums[0] += exp(log_prob);
        sums[1] += log_prob;
        sums[2] += 1;
      }
    }
  });
  block_sum<kScoreThreads>(sums);
  if (threadIdx.x != 0) return;
  const int m = table.first + blockIdx.y;
  if (gridDim.x == 1) {
    store_scores(call, m, sums);
  } else {
    double* partial =
        call.workspace + (static_cast<int64_t>(m) * gridDim.x + blockIdx.x) * kScoreSums;
    for (int k = 0; k < kScoreSums; ++k) partial[k] = sums[k];
  }
}

// Block m adds the partial sums of modality m.
__global__ void __launch_bounds__(kScoreThreads)
    modality_scores_finalise_kernel(const ScoreOutputs __grid_constant__ call, int blocks) {
  const double* partial = call.workspace + static_cast<int64_t>(blockIdx.x) * blocks * kScoreSums;
  double sums[kScoreSums] = {};
  for (int block = threadIdx.x; block < blocks; block += kScoreThreads) {
    for (int k = 0; k < kScoreSums; ++k) sums[k] += partial[block * kScoreSums + k];
  }
  block_sum<kScoreThreads>(sums);
  if (threadIdx.x == 0) store_scores(call, blockIdx.x, sums);
}

// Blocks (:, m) write the gradient of modality m's logits, one warp per row.
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm)
    modality_scores_backward_kernel(const ModalityTable<ScoreGradients> __grid_constant__ table) {
  const ScoreGradients& call = table.common;
  const ModalityLogits& modality = table.modalities[blockIdx.y];
  // Counting the labels again is cheaper than a launch that does it for all blocks.
  double count[1] = {0};
  for (int64_t i = threadIdx.x; i < call.rows; i += kBackwardThreads) {
    count[0] += call.labels[i] != kIgnoredLabel;
  }
  block_sum<kBackwardThreads>(count);
  visit_dtype(modality.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    constexpr int kWarps = kBackwardThreads / kWarpSize;
    const int m = table.first + blockIdx.y;
    const acc_t grad_prob = load_coefficient<acc_t>(call.grad_prob, m);
    const acc_t grad_log_prob = load_coefficient<acc_t>(call.grad_log_prob, m);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t i = blockIdx.x * kWarps + threadIdx.x / kWarpSize; i < call.rows; i += step) {
      const int64_t label = call.labels[i];
      const scalar_t* row = static_cast<const scalar_t*>(modality.logits) + i * modality.classes;
      scalar_t* grad = static_cast<scalar_t*>(modality.grad) + i * modality.classes;
      const int lane = threadIdx.x % kWarpSize;
      if (label == kIgnoredLabel) {
        for (int c = lane; c < modality.classes; c += kWarpSize) {
          grad[c] = round_to<scalar_t>(acc_t(0));
        }
        continue;
      }
      const auto softmax = row_softmax(row, modality.classes);
      const acc_t prob = exp(true_log_prob(row, modality.classes, label, softmax));
      const acc_t weight = (grad_prob * prob + grad_log_prob) / static_cast<acc_t>(count[0]);
      for (int c = lane; c < modality.classes; c += kWarpSize) {
        const acc_t p = exp(widen<acc_t>(row[c]) - softmax.max - softmax.log_sum);
        grad[c] = round_to<scalar_t>(weight * ((c == label ? acc_t(1) : acc_t(0)) - p));
      }
    }
  });
}

// Calls start(table, how many modalities it holds) until all have been handled.
template <typename common_t, typename F>
void for_each_table(const std::vector<ModalityLogits>& modalities, const common_t& common,
                    const F& start) {
  ModalityTable<common_t> table;
  table.common = common;
  const int total = static_cast<int>(modalities.size());
  for (table.first = 0; table.first < total; table.first += kMaxModalities) {
    const int count = std::min(total - table.first, kMaxModalities);
    std::copy_n(modalities.begin() + table.first, count, table.modalities);
    start(table, count);
  }
}

}  // namespace

void launch_modality_scores(const ModalityScoresParams& params, cudaStream_t stream) {
  const ScoreOutputs common{params.labels, params.rows,     params.workspace,
                            params.prob,   params.log_prob, params.wide};
  const unsigned blocks = static_cast<unsigned>(score_blocks(params.rows));
  for_each_table(params.modalities, common, [&](const auto& table, unsigned count) {
    launch("modality_scores_kernel", modality_scores_kernel, dim3(blocks, count), kScoreThreads,
           stream, table);
  });
  if (blocks > 1) {
    launch("modality_scores_finalise_kernel", modality_scores_finalise_kernel,
           params.modalities.size(), kScoreThreads, stream, common, static_cast<int>(blocks));
  }
}

void launch_modality_scores_backward(const ModalityScoresBackwardParams& params,
                                     cudaStream_t stream) {
  if (params.rows == 0) return;
  const ScoreGradients common{params.labels, params.rows, params.grad_prob, params.grad_log_prob};
  constexpr int kWarps = kBackwardThreads / kWarpSize;
  const unsigned blocks =
      resident_blocks((params.rows + kWarps - 1) / kWarps, kBackwardBlocksPerSm);
  for_each_table(params.modalities, common, [&](const auto& table, unsigned count) {
    launch("modality_scores_backward_kernel", modality_scores_backward_kernel, dim3(blocks, count),
           kBackwardThreads, stream, table);
  });
}

}  // namespace mmfuse::cuda
