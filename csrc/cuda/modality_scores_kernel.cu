#include <math.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/score_rows.h"
#include "modality_scores.h"

namespace mmfuse::cuda {
namespace {

constexpr int kScoreThreads = 1024;
// Sums of shares take more registers than 1,024 threads have.
template <TargetKind kKind>
constexpr int kThreadsOf = kKind == TargetKind::kShares ? 256 : kScoreThreads;
// Said aloud, or the compiler would spill for more.
template <TargetKind kKind>
constexpr int kBlocksPerSmOf = kKind == TargetKind::kShares ? 2 : 1;

constexpr int kBackwardThreads = 256;
constexpr int kBackwardBlocksPerSm = 3;
constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsBlocksPerSm = 3;
constexpr int kMaxModalities = 16;

// The modalities from `first` on that one launch handles.
template <typename common_t>
struct ModalityTable {
  common_t common;
  int first;
  ModalityLogits modalities[kMaxModalities];
};

struct ScoreOutputs {
  ScoreTargets targets;
  double* workspace;
  void* prob;
  void* log_prob;
  double* count;  // of modality `widest`
  int widest;
  bool wide;
};

struct ScoreGradients {
  ScoreTargets targets;
  const double* count;
  Coefficients grad_prob;
  Coefficients grad_log_prob;
};

__device__ __forceinline__ void store_scores(const ScoreOutputs& call, int m,
                                             const double (&sums)[kScoreSums]) {
  // Without a row that counts this is 0 / 0.
  store_result(call.prob, call.wide, sums[0] / sums[2], m);
  store_result(call.log_prob, call.wide, sums[1] / sums[2], m);
  if (m == call.widest) *call.count = sums[2];
}

// Adds the sums of block (x, m)'s threads: the scores if it has all rows, else a part of them.
template <int kThreads>
__device__ __forceinline__ void store_sums(const ScoreOutputs& call, int m,
                                           double (&sums)[kScoreSums]) {
  block_sum<kThreads>(sums);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    store_scores(call, m, sums);
  } else {
    double* partial =
        call.workspace + (static_cast<int64_t>(m) * gridDim.x + blockIdx.x) * kScoreSums;
    for (int k = 0; k < kScoreSums; ++k) partial[k] = sums[k];
  }
}

// Calls f(row, score) for block x's kScoreRows rows of a modality, by the first of each team.
template <TargetKind kKind, typename F>
__device__ __forceinline__ void for_each_score(const ModalityLogits& modality,
                                               const ScoreTargets& targets, const F& f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoreRows;
  visit_teams<kThreadsOf<kKind>>(modality, [&](auto team, auto* type) {
    using team_t = decltype(team);
    using scalar_t = std::remove_pointer_t<decltype(type)>;
#pragma unroll 1
    for (int r = team_t::row(); r < kScoreRows; r += team_t::kRows) {
      const auto row = logit_row<scalar_t>(modality, targets, first + r);
      if (!team_t::kColumns && !row.counts) break;
      const auto score = score_row<team_t, kKind>(targets, row);
      if (row.counts && team_t::rank() == 0) f(first + r, score);
    }
  });
}

// Block (x, m) sums kScoreRows rows of modality m.
template <TargetKind kKind>
__global__ void __launch_bounds__(kThreadsOf<kKind>, kBlocksPerSmOf<kKind>)
    modality_scores_kernel(const ModalityTable<ScoreOutputs> __grid_constant__ table) {
  const ScoreOutputs& call = table.common;
  double sums[kScoreSums] = {};
  for_each_score<kKind>(table.modalities[blockIdx.y], call.targets,
                        [&](int64_t, const auto& score) {
                          if (score.weight == 0) return;
                          sums[0] += score.weight * score.prob;
                          sums[1] += score.weight * score.log_prob;
                          sums[2] += score.weight;
                        });
  store_sums<kThreadsOf<kKind>>(call, table.first + blockIdx.y, sums);
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

// Block (x, m) writes the scores of kScoreRows rows of modality m.
template <TargetKind kKind>
__global__ void __launch_bounds__(kThreadsOf<kKind>, kBlocksPerSmOf<kKind>)
    sample_scores_kernel(const ModalityTable<ScoreOutputs> __grid_constant__ table) {
  const ScoreOutputs& call = table.common;
  const int m = table.first + blockIdx.y;
  for_each_score<kKind>(table.modalities[blockIdx.y], call.targets,
                        [&](int64_t row, const auto& score) {
                          const int64_t place = m * call.targets.rows + row;
                          store_result(call.prob, call.wide, score.prob, place);
                          store_result(call.log_prob, call.wide, score.log_prob, place);
                          if (m == call.widest) call.count[row] = score.weight;
                        });
}

struct StatisticsOutputs {
  ScoreTargets targets;
  double* weights;  // of modality `widest`
  void* prob;
  void* log_prob;
  bool* correct;
  void* entropy;
  void* log_sum_exp;
  void* abs_sum;
  int widest;
  bool wide;
};

// Calls f(row, weight, log_prob, statistics) for block x's kScoreRows rows of a modality, by the
// first of each team.
template <typename F>
__device__ __forceinline__ void for_each_statistics(const ModalityLogits& modality,
                                                    const ScoreTargets& targets, const F& f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoreRows;
  visit_teams<kStatisticsThreads>(modality, [&](auto team, auto* type) {
    using team_t = decltype(team);
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
#pragma unroll 1
    for (int r = team_t::row(); r < kScoreRows; r += team_t::kRows) {
      const auto row = logit_row<scalar_t>(modality, targets, first + r);
      if (!team_t::kColumns && !row.counts) break;
      const int64_t label =
          row.counts ? static_cast<const int64_t*>(targets.values)[row.target] : 0;
      RowSoftmax<acc_t> softmax;
      const RowStatistics<acc_t> found = row_statistics<team_t>(row, label, softmax);
      if (!row.counts || team_t::rank() != 0) continue;
      const bool possible = label >= 0 && label < row.classes;
      const int64_t stride = team_t::kColumns ? row.stride : 1;
      const acc_t log_prob =
          possible ? widen<acc_t>(row.x[label * stride]) - softmax.max - softmax.log_sum
                   : static_cast<acc_t>(NAN);
      f(first + r, index_weight(targets, label, row.classes), log_prob, found);
    }
  });
}

// Block (x, m) writes the scores and statistics of kScoreRows rows of modality m.
__global__ void __launch_bounds__(kStatisticsThreads, kStatisticsBlocksPerSm)
    sample_statistics_kernel(const ModalityTable<StatisticsOutputs> __grid_constant__ table) {
  const StatisticsOutputs& call = table.common;
  const int m = table.first + blockIdx.y;
  for_each_statistics(table.modalities[blockIdx.y], call.targets,
                      [&](int64_t row, double weight, auto log_prob, const auto& found) {
                        using acc_t = decltype(log_prob);
                        const bool counts = weight != 0;
                        const int64_t place = m * call.targets.rows + row;
                        const auto put = [&](void* to, acc_t x) {
                          store_result(to, call.wide, counts ? x : acc_t(0), place);
                        };
                        put(call.prob, exp(log_prob));
                        put(call.log_prob, log_prob);
                        put(call.entropy, found.entropy);
                        put(call.log_sum_exp, found.log_sum_exp);
                        put(call.abs_sum, found.abs_sum);
                        call.correct[place] = counts && found.correct;
                        if (m == call.widest) call.weights[row] = weight;
                      });
}

// Block (x, m) sums kScoreRows rows of modality m: those that are right, and prob.
__global__ void __launch_bounds__(kStatisticsThreads, kStatisticsBlocksPerSm)
    modality_accuracies_kernel(const ModalityTable<ScoreOutputs> __grid_constant__ table) {
  const ScoreOutputs& call = table.common;
  double sums[kScoreSums] = {};
  for_each_statistics(table.modalities[blockIdx.y], call.targets,
                      [&](int64_t, double weight, auto log_prob, const auto& found) {
                        if (weight == 0) return;
                        if (found.correct) sums[0] += weight;
                        sums[1] += weight * exp(log_prob);
                        sums[2] += weight;
                      });
  store_sums<kStatisticsThreads>(call, table.first + blockIdx.y, sums);
}

// The gradient of one row, from its scores; for class indices (grad_prob p + grad_log_prob) w /
// count (onehot - softmax).
template <typename team_t, TargetKind kKind, typename scalar_t, typename acc_t>
__device__ __forceinline__ void write_gradient(const ScoreTargets& targets,
                                               const LogitRow<scalar_t>& row,
                                               const RowScore<acc_t>& score, acc_t grad_prob,
                                               acc_t grad_log_prob, acc_t count) {
  const int64_t stride = team_t::kColumns ? row.stride : 1;
  const int64_t grad_stride = team_t::kColumns ? row.grad_stride : 1;
  acc_t weight = (grad_prob * score.prob + grad_log_prob) / count;
  if (kKind == TargetKind::kShares || targets.weight != nullptr) {
    weight *= static_cast<acc_t>(score.weight);
  }
  const int64_t label = kKind == TargetKind::kIndices && row.counts
                            ? static_cast<const int64_t*>(targets.values)[row.target]
                            : 0;
  for (int c = team_t::rank(); c < row.classes; c += team_t::kSize) {
    acc_t grad = 0;
    if constexpr (kKind == TargetKind::kLabels) {
      const Likelihood<acc_t> one = likelihood<acc_t>(targets, row, c, stride);
      grad = shared(one.share / score.total,
                    (grad_prob * one.prob + grad_log_prob) / count * one.slope);
    } else if (score.weight != 0) {
      const acc_t p =
          exp(widen<acc_t>(row.x[c * stride]) - score.softmax.max - score.softmax.log_sum);
      if constexpr (kKind == TargetKind::kIndices) {
        grad = weight * ((c == label ? acc_t(1) : acc_t(0)) - p);
      } else {
        const acc_t a = class_share<acc_t>(targets, row, c);
        grad = a * (grad_prob * p + grad_log_prob) / count - weight * p;
      }
    }
    row.grad[c * grad_stride] = round_to<scalar_t>(grad);
  }
}

// Blocks (:, m) write the gradient of modality m's logits.
template <TargetKind kKind>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm)
    modality_scores_backward_kernel(const ModalityTable<ScoreGradients> __grid_constant__ table) {
  const ScoreGradients& call = table.common;
  const ModalityLogits& modality = table.modalities[blockIdx.y];
  visit_teams<kBackwardThreads>(modality, [&](auto team, auto* type) {
    using team_t = decltype(team);
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    const int m = table.first + blockIdx.y;
    const acc_t grad_prob = load_coefficient<acc_t>(call.grad_prob, m);
    const acc_t grad_log_prob = load_coefficient<acc_t>(call.grad_log_prob, m);
    const acc_t count = static_cast<acc_t>(*call.count);
    const int64_t step = static_cast<int64_t>(gridDim.x) * team_t::kRows;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * team_t::kRows;
         first < call.targets.rows; first += step) {
      const auto row = logit_row<scalar_t>(modality, call.targets, first + team_t::row());
      if (!team_t::kColumns && !row.counts) break;
      const auto score = score_row<team_t, kKind>(call.targets, row);
      write_gradient<team_t, kKind>(call.targets, row, score, grad_prob, grad_log_prob, count);
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

// f(kind as a type)
template <typename F>
void visit_kind(TargetKind kind, const F& f) {
  switch (kind) {
    case TargetKind::kIndices:
      return f(std::integral_constant<TargetKind, TargetKind::kIndices>{});
    case TargetKind::kShares:
      return f(std::integral_constant<TargetKind, TargetKind::kShares>{});
    case TargetKind::kLabels:
      return f(std::integral_constant<TargetKind, TargetKind::kLabels>{});
  }
}

// Sums by start(table, blocks), and the means of what several blocks have summed.
template <typename F>
void launch_means(const ModalityScoresParams& params, cudaStream_t stream, const F& start) {
  const ScoreOutputs common{params.targets, params.workspace, params.prob, params.log_prob,
                            params.count,   params.widest,    params.wide};
  const unsigned blocks = static_cast<unsigned>(score_blocks(params.targets.rows));
  for_each_table(params.modalities, common,
                 [&](const auto& table, unsigned count) { start(table, dim3(blocks, count)); });
  if (blocks > 1) {
    launch("modality_scores_finalise_kernel", modality_scores_finalise_kernel,
           params.modalities.size(), kScoreThreads, stream, common, static_cast<int>(blocks));
  }
}

}  // namespace

void launch_modality_scores(const ModalityScoresParams& params, cudaStream_t stream) {
  launch_means(params, stream, [&](const auto& table, dim3 blocks) {
    visit_kind(params.targets.kind, [&](auto kind) {
      launch("modality_scores_kernel", modality_scores_kernel<kind()>, blocks, kThreadsOf<kind()>,
             stream, table);
    });
  });
}

void launch_modality_accuracies(const ModalityScoresParams& params, cudaStream_t stream) {
  launch_means(params, stream, [&](const auto& table, dim3 blocks) {
    launch("modality_accuracies_kernel", modality_accuracies_kernel, blocks, kStatisticsThreads,
           stream, table);
  });
}

void launch_sample_scores(const SampleScoresParams& params, cudaStream_t stream) {
  if (params.targets.rows == 0) return;
  const ScoreOutputs common{params.targets, nullptr,       params.prob, params.log_prob,
                            params.weights, params.widest, params.wide};
  const unsigned blocks = static_cast<unsigned>(score_blocks(params.targets.rows));
  visit_kind(params.targets.kind, [&](auto kind) {
    for_each_table(params.modalities, common, [&](const auto& table, unsigned count) {
      launch("sample_scores_kernel", sample_scores_kernel<kind()>, dim3(blocks, count),
             kThreadsOf<kind()>, stream, table);
    });
  });
}

void launch_sample_statistics(const SampleStatisticsParams& params, cudaStream_t stream) {
  const SampleScoresParams& scores = params.scores;
  if (scores.targets.rows == 0) return;
  const StatisticsOutputs common{
      scores.targets, scores.weights,     scores.prob,    scores.log_prob, params.correct,
      params.entropy, params.log_sum_exp, params.abs_sum, scores.widest,   scores.wide};
  const unsigned blocks = static_cast<unsigned>(score_blocks(scores.targets.rows));
  for_each_table(scores.modalities, common, [&](const auto& table, unsigned count) {
    launch("sample_statistics_kernel", sample_statistics_kernel, dim3(blocks, count),
           kStatisticsThreads, stream, table);
  });
}

void launch_modality_scores_backward(const ModalityScoresBackwardParams& params,
                                     cudaStream_t stream) {
  if (params.targets.rows == 0) return;
  const ScoreGradients common{params.targets, params.count, params.grad_prob, params.grad_log_prob};
  constexpr int kWarps = kBackwardThreads / kWarpSize;
  const unsigned blocks =
      resident_blocks((params.targets.rows + kWarps - 1) / kWarps, kBackwardBlocksPerSm);
  visit_kind(params.targets.kind, [&](auto kind) {
    for_each_table(params.modalities, common, [&](const auto& table, unsigned count) {
      launch("modality_scores_backward_kernel", modality_scores_backward_kernel<kind()>,
             dim3(blocks, count), kBackwardThreads, stream, table);
    });
  });
}

}  // namespace mmfuse::cuda
