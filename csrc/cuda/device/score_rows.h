// Scores of rows of logits, each by a team of threads: a warp where the row's classes adjoin in
// memory, and threads of several warps where the rows do, so that a warp reads consecutive rows.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>
#include <type_traits>

#include "cuda/modality_scores.h"
#include "element.h"
#include "long_sum.h"
#include "reduce.h"

namespace mmfuse::cuda {

template <int kThreads>
struct WarpTeam {
  static constexpr bool kColumns = false;
  static constexpr int kRows = kThreads / kWarpSize;
  static constexpr int kSize = kWarpSize;

  static __device__ __forceinline__ int row() { return threadIdx.x / kWarpSize; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kWarpSize; }

  template <typename acc_t>
  static __device__ __forceinline__ acc_t max(acc_t x) {
    return warp_max(x);
  }
  template <typename acc_t>
  static __device__ __forceinline__ acc_t sum(acc_t x) {
    return warp_sum(x);
  }
};

// All threads of the block must call max and sum together.
template <int kThreads>
struct ColumnTeam {
  static constexpr bool kColumns = true;
  static constexpr int kSize = 8;
  static constexpr int kRows = kThreads / kSize;

  static __device__ __forceinline__ int row() { return threadIdx.x % kRows; }
  static __device__ __forceinline__ int rank() { return threadIdx.x / kRows; }

  template <typename acc_t>
  static __device__ __forceinline__ const acc_t* gather(acc_t x) {
    __shared__ acc_t values[kThreads];
    __syncthreads();  // the previous call's values have been read
    values[threadIdx.x] = x;
    __syncthreads();
    return values + row();
  }
  template <typename acc_t>
  static __device__ __forceinline__ acc_t max(acc_t x) {
    const acc_t* values = gather(x);
    acc_t found = values[0];
    for (int k = 1; k < kSize; ++k) {
      const acc_t other = values[k * kRows];
      found = other > found ? other : found;
    }
    return found;
  }
  template <typename acc_t>
  static __device__ __forceinline__ acc_t sum(acc_t x) {
    const acc_t* values = gather(x);
    acc_t found = 0;
    for (int k = 0; k < kSize; ++k) found += values[k * kRows];
    return found;
  }
};

// log softmax of class c is logits[c] - max - log_sum.
template <typename acc_t>
struct RowSoftmax {
  acc_t max;
  acc_t log_sum;
};

template <typename acc_t>
struct RowScore {
  acc_t prob;
  acc_t log_prob;
  double weight;
  acc_t total;  // of the labels' shares
  RowSoftmax<acc_t> softmax;
};

// One row, or none: then it has no classes.
template <typename scalar_t>
struct LogitRow {
  const scalar_t* x;
  scalar_t* grad;
  int64_t stride;  // of classes
  int64_t grad_stride;
  int64_t target;  // place of the first class's target, or of the row's
  int classes;
  bool counts;  // false: nothing of it is read
};

template <typename acc_t>
__device__ __forceinline__ acc_t shared(acc_t a, acc_t x) {
  return a == acc_t(0) ? acc_t(0) : a * x;
}

template <typename acc_t>
__device__ __forceinline__ acc_t finite_max(acc_t max) {
  return max == static_cast<acc_t>(-INFINITY) ? acc_t(0) : max;
}

// exp(x - max), and 0 for x = -inf even while nothing larger has been seen.
template <typename acc_t>
__device__ __forceinline__ acc_t shifted_exp(acc_t x, acc_t max) {
  return exp(x - finite_max(max));
}

// A target of the logits' shape, NaN outside of [0, 1].
template <typename acc_t>
__device__ __forceinline__ acc_t read_target(const ScoreTargets& targets, int64_t place) {
  acc_t t = 0;
  visit_dtype(targets.dtype, [&](auto* type) {
    using target_t = std::remove_pointer_t<decltype(type)>;
    t = widen<acc_t>(static_cast<const target_t*>(targets.values)[place]);
  });
  return t >= acc_t(0) && t <= acc_t(1) ? t : static_cast<acc_t>(NAN);
}

template <typename acc_t>
__device__ __forceinline__ acc_t number_of_class(const double* numbers, int c) {
  return numbers == nullptr ? acc_t(1) : static_cast<acc_t>(numbers[c]);
}

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t class_share(const ScoreTargets& targets,
                                             const LogitRow<scalar_t>& row, int c) {
  return number_of_class<acc_t>(targets.weight, c) *
         read_target<acc_t>(targets, row.target + c * targets.strides.klass);
}

// One pass over a row: each thread rescales its sums when its maximum rises. Eight loads are in
// flight per thread, because a small batch waits for nothing else; they are a run of its sums.
template <typename team_t, bool kShares, typename scalar_t>
__device__ __forceinline__ RowScore<acc_type<scalar_t>> sum_row(const ScoreTargets& targets,
                                                                const LogitRow<scalar_t>& row) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kBatch = (std::is_same_v<acc_t, double> ? 2 : 8) / (kShares ? 2 : 1);
  constexpr int kSize = team_t::kSize;
  const int64_t stride = team_t::kColumns ? row.stride : 1;
  acc_t max = static_cast<acc_t>(-INFINITY);
  LongSum<acc_t> sum, prob, log_prob, total;
  for (int c = team_t::rank(); c < row.classes; c += kBatch * kSize) {
    acc_t x[kBatch];
    acc_t batch_max = max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool inside = c + u * kSize < row.classes;
      x[u] = inside ? widen<acc_t>(row.x[(c + u * kSize) * stride]) : static_cast<acc_t>(-INFINITY);
      batch_max = x[u] > batch_max ? x[u] : batch_max;
    }
    const acc_t factor = shifted_exp(max, batch_max);
    sum.scale(factor);
    if constexpr (kShares) {
      prob.scale(factor);
      log_prob.add(shared(total.total(), finite_max(max) - finite_max(batch_max)));
    }
    max = batch_max;
    acc_t run = 0, run_prob = 0, run_log_prob = 0, run_total = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const acc_t e = shifted_exp(x[u], max);
      run += e;
      if constexpr (kShares) {
        if (c + u * kSize < row.classes) {
          const acc_t a = class_share<acc_t>(targets, row, c + u * kSize);
          run_prob += a * e;
          run_log_prob += shared(a, x[u] - finite_max(max));
          run_total += a;
        }
      }
    }
    sum.add(run);
    if constexpr (kShares) {
      prob.add(run_prob);
      log_prob.add(run_log_prob);
      total.add(run_total);
    }
  }
  const acc_t row_max = team_t::max(max);
  const acc_t factor = shifted_exp(max, row_max);
  const acc_t row_sum = team_t::sum(sum.total() * factor);
  RowScore<acc_t> score{};
  score.softmax = {row_max, log(row_sum)};
  if constexpr (kShares) {
    log_prob.add(shared(total.total(), finite_max(max) - finite_max(row_max)));
    const acc_t all_log_prob = team_t::sum(log_prob.total());
    const acc_t all = team_t::sum(total.total());
    const bool possible = row_max != static_cast<acc_t>(-INFINITY);
    score.prob = team_t::sum(prob.total() * factor) / row_sum / all;
    score.log_prob = all_log_prob / all - (possible ? log(row_sum) : static_cast<acc_t>(NAN));
    score.total = all;
    score.weight = all;
  }
  return score;
}

// A label's likelihood under z, and the derivative of its logarithm.
template <typename acc_t>
struct Likelihood {
  acc_t share;
  acc_t prob;
  acc_t log_prob;
  acc_t slope;
};

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ Likelihood<acc_t> likelihood(const ScoreTargets& targets,
                                                        const LogitRow<scalar_t>& row, int c,
                                                        int64_t stride) {
  const acc_t z = widen<acc_t>(row.x[c * stride]);
  const acc_t y = read_target<acc_t>(targets, row.target + c * targets.strides.klass);
  const acc_t e = exp(-fabs(z));
  const acc_t against =
      shared(acc_t(1) - y, z > acc_t(0) ? z : acc_t(0)) + shared(y, z < acc_t(0) ? -z : acc_t(0));
  const acc_t log_prob = -(log1p(e) + against);
  const acc_t yes = number_of_class<acc_t>(targets.pos_weight, c) * y;
  return {number_of_class<acc_t>(targets.weight, c) * (yes + (acc_t(1) - y)), exp(log_prob),
          log_prob, y - (z < acc_t(0) ? e : acc_t(1)) / (acc_t(1) + e)};
}

template <typename team_t, typename scalar_t>
__device__ __forceinline__ RowScore<acc_type<scalar_t>> sum_labels(const ScoreTargets& targets,
                                                                   const LogitRow<scalar_t>& row) {
  using acc_t = acc_type<scalar_t>;
  const int64_t stride = team_t::kColumns ? row.stride : 1;
  LongSum<acc_t> prob, log_prob, total;
  for (int c = team_t::rank(); c < row.classes; c += team_t::kSize) {
    const Likelihood<acc_t> label = likelihood<acc_t>(targets, row, c, stride);
    prob.add(label.share * label.prob);
    log_prob.add(shared(label.share, label.log_prob));
    total.add(label.share);
  }
  RowScore<acc_t> score{};
  score.total = team_t::sum(total.total());
  score.prob = team_t::sum(prob.total()) / score.total;
  score.log_prob = team_t::sum(log_prob.total()) / score.total;
  score.weight = 1;
  return score;
}

// How much a row with this class index counts; NaN if there is no such class to weigh.
__device__ __forceinline__ double index_weight(const ScoreTargets& targets, int64_t label,
                                               int classes) {
  if (label == targets.ignore_index) return 0;
  if (targets.weight == nullptr) return 1;
  return label >= 0 && label < classes ? targets.weight[label] : static_cast<double>(NAN);
}

// The scores of a row; 0 for one that does not count.
template <typename team_t, TargetKind kKind, typename scalar_t>
__device__ __forceinline__ RowScore<acc_type<scalar_t>> score_row(const ScoreTargets& targets,
                                                                  LogitRow<scalar_t> row) {
  using acc_t = acc_type<scalar_t>;
  RowScore<acc_t> score{};
  if constexpr (kKind == TargetKind::kLabels) {
    score = sum_labels<team_t>(targets, row);
  } else if constexpr (kKind == TargetKind::kShares) {
    score = sum_row<team_t, true>(targets, row);
  } else {
    const int64_t label = row.counts ? static_cast<const int64_t*>(targets.values)[row.target] : 0;
    const double weight = row.counts ? index_weight(targets, label, row.classes) : 0.0;
    // A warp may leave out a row alone, a block may not.
    if (!team_t::kColumns && weight == 0) return score;
    score = sum_row<team_t, false>(targets, row);
    score.weight = weight;
    if (weight != 0) {
      const int64_t stride = team_t::kColumns ? row.stride : 1;
      const bool possible = label >= 0 && label < row.classes;
      score.log_prob =
          possible ? widen<acc_t>(row.x[label * stride]) - score.softmax.max - score.softmax.log_sum
                   : static_cast<acc_t>(NAN);
      score.prob = exp(score.log_prob);
    }
  }
  if (!row.counts || score.weight == 0) score.weight = score.prob = score.log_prob = 0;
  return score;
}

// Further statistics of a row, against a class index.
template <typename acc_t>
struct RowStatistics {
  bool correct;
  acc_t entropy;
  acc_t log_sum_exp;
  acc_t abs_sum;
};

// Turns the sums of exp(x - max) and exp(x - max) (x - max) into those with a higher maximum.
template <typename acc_t>
__device__ __forceinline__ void lower_max(LongSum<acc_t>& sum, LongSum<acc_t>& below_sum, acc_t max,
                                          acc_t higher) {
  const acc_t factor = shifted_exp(max, higher);
  const acc_t lower = finite_max(max) - finite_max(higher);
  // Nothing yet, or nothing left: 0 x inf would be NaN.
  if (sum.sum != acc_t(0)) below_sum.add(lower * sum.total());
  if (factor == acc_t(0)) {
    below_sum = {};
  } else {
    below_sum.scale(factor);
  }
  sum.scale(factor);
}

// Sums in one pass with `sum_row`'s, which go to `softmax` as there.
template <typename team_t, typename scalar_t>
__device__ __forceinline__ RowStatistics<acc_type<scalar_t>> row_statistics(
    const LogitRow<scalar_t>& row, int64_t label, RowSoftmax<acc_type<scalar_t>>& softmax) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kBatch = std::is_same_v<acc_t, double> ? 1 : 4;
  constexpr int kSize = team_t::kSize;
  const int64_t stride = team_t::kColumns ? row.stride : 1;
  const bool possible = label >= 0 && label < row.classes;
  const acc_t own = possible ? widen<acc_t>(row.x[label * stride]) : static_cast<acc_t>(NAN);
  acc_t max = static_cast<acc_t>(-INFINITY);
  int ahead = 0;
  LongSum<acc_t> sum, below_sum, abs_sum;
  for (int c = team_t::rank(); c < row.classes; c += kBatch * kSize) {
    acc_t x[kBatch];
    acc_t batch_max = max;
    acc_t run = 0, run_below = 0, run_abs = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = c + u * kSize;
      const bool inside = at < row.classes;
      x[u] = inside ? widen<acc_t>(row.x[at * stride]) : static_cast<acc_t>(-INFINITY);
      batch_max = x[u] > batch_max ? x[u] : batch_max;
      run_abs += inside ? fabs(x[u]) : acc_t(0);
      ahead += inside && (x[u] > own || (x[u] == own && at < label));
    }
    lower_max(sum, below_sum, max, batch_max);
    max = batch_max;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const acc_t e = shifted_exp(x[u], max);
      run += e;
      run_below += shared(e, x[u] - finite_max(max));
    }
    sum.add(run);
    below_sum.add(run_below);
    abs_sum.add(run_abs);
  }
  const acc_t row_max = team_t::max(max);
  lower_max(sum, below_sum, max, row_max);
  const acc_t row_below = team_t::sum(below_sum.total());
  const acc_t row_sum = team_t::sum(sum.total());
  softmax = {row_max, log(row_sum)};
  RowStatistics<acc_t> found;
  found.correct = team_t::sum(ahead) == 0 && possible && row_sum > acc_t(0);
  // Without a class that can be, softmax is 0 / 0.
  found.entropy = softmax.log_sum - row_below / row_sum;
  found.log_sum_exp = row_sum == acc_t(0) ? static_cast<acc_t>(NAN) : row_max + softmax.log_sum;
  found.abs_sum = team_t::sum(abs_sum.total());
  return found;
}

// Row `index` of a modality; beyond the last one, a row of nothing.
template <typename scalar_t>
__device__ __forceinline__ LogitRow<scalar_t> logit_row(const ModalityLogits& modality,
                                                        const ScoreTargets& targets,
                                                        int64_t index) {
  LogitRow<scalar_t> row{};
  if (index >= targets.rows) return row;
  const int64_t outer = index / targets.inner, inner = index - outer * targets.inner;
  const auto place = [&](const RowStrides& strides) {
    return outer * strides.outer + inner * strides.inner;
  };
  row.x = static_cast<const scalar_t*>(modality.logits) + place(modality.strides);
  row.grad = static_cast<scalar_t*>(modality.grad) + place(modality.grad_strides);
  row.stride = modality.strides.klass;
  row.grad_stride = modality.grad_strides.klass;
  row.target = targets.kind == TargetKind::kIndices ? index : place(targets.strides);
  row.classes = modality.classes;
  row.counts = true;
  return row;
}

// f(team, null pointer of the logits' type)
template <int kThreads, typename F>
__device__ __forceinline__ void visit_teams(const ModalityLogits& modality, const F& f) {
  visit_dtype(modality.dtype, [&](auto* type) {
    if (modality.classes_adjoin) {
      f(WarpTeam<kThreads>{}, type);
    } else {
      f(ColumnTeam<kThreads>{}, type);
    }
  });
}

}  // namespace mmfuse::cuda
