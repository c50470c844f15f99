#include "modality_scores.h"

#include <limits>
#include <memory>

#include "glue/chunks.h"
#include "glue/coefficients.h"
#include "glue/score_rows.h"

#define MMFUSE_KERNEL "cpu/modality_scores_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Enough rows to be worth a task of their own.
constexpr int64_t kTaskElements = 16384;
// If the rows adjoin, a task has whole vectors of them.
constexpr int64_t kTaskColumns = 64;

// A pass over rows. They differ by less than the kinds of rows do, but for one: gradients go row by
// row where scores go side by side.
enum class Pass { kScores, kGradients };

Nanoseconds cost_of(const LogitRows& rows, Pass pass) {
  const bool wide = rows.dtype == DType::kFloat64;
  double element = rows.classes_adjoin ? (wide ? 1.7 : 0.2) : (wide ? 3 : 1);
  if (rows.kind == TargetKind::kShares) element = wide ? 2.3 : 1.1;
  if (rows.kind == TargetKind::kLabels) element = wide ? 9 : 2.3;
  double row = rows.classes_adjoin ? 40 : 0;
  if (pass == Pass::kScores && rows.classes_adjoin && better_as_columns(rows)) {
    row = wide ? 15 : 8;
    element = wide ? 1.6 : 0.6;
  }
  return rows.end * ns(row + static_cast<double>(rows.classes) * element);
}

// The logits and targets of a call, and its weights in both types.
struct C10_HIDDEN Call {
  std::vector<LogitRows> modalities;
  std::vector<float> narrow_weight, narrow_pos_weight;
  std::vector<double> wide_weight, wide_pos_weight;
  int64_t rows = 0;

  Call(const TensorList& logits, const Tensor& labels, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& pos_weight, int64_t ignore_index, bool multilabel) {
    const std::vector<RowLayout> layouts =
        checked_layouts(logits, labels, weight, pos_weight, multilabel);
    modalities.reserve(logits.size());
    const ClassWeights of_class = weights_of(weight, narrow_weight, wide_weight);
    const ClassWeights of_yes = weights_of(pos_weight, narrow_pos_weight, wide_pos_weight);
    const bool indices = labels.scalar_type() == ScalarType::Long;
    for (size_t m = 0; m < logits.size(); ++m) {
      const RowLayout& layout = layouts[m];
      LogitRows& all = modalities.emplace_back();
      all.dtype = dtype_of(logits[m]);
      all.logits = logits[m].const_data_ptr();
      all.strides = {layout.outer_stride, layout.class_stride, layout.inner_stride};
      all.classes_adjoin = layout.classes_adjoin;
      all.classes = layout.classes;
      all.inner = std::max<int64_t>(layout.inner, 1);
      all.end = rows = layout.outer * layout.inner;
      all.weight = of_class;
      all.pos_weight = of_yes;
      all.ignore_index = ignore_index;
      if (indices) {
        all.kind = TargetKind::kIndices;
        all.labels = static_cast<const int64_t*>(labels.const_data_ptr());
      } else {
        const RowLayout targets = row_layout(labels);
        all.kind = multilabel ? TargetKind::kLabels : TargetKind::kShares;
        all.target_dtype = dtype_of(labels);
        all.targets = labels.const_data_ptr();
        all.target_strides = {targets.outer_stride, targets.class_stride, targets.inner_stride};
      }
    }
  }

  // f(rows, m) for every modality m, in parts of its rows.
  template <typename F>
  void for_each_part(Pass pass, const F& f) const {
    std::vector<int64_t> first{0};
    Nanoseconds cost = ns(0);
    for (const LogitRows& all : modalities) {
      cost = cost + cost_of(all, pass);
      first.push_back(first.back() + (all.end + step_of(all) - 1) / step_of(all));
    }
    parallel_each(first.back(), cost, [&](int64_t i) {
      const size_t m = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
      LogitRows part = modalities[m];
      part.begin = (i - first[m]) * step_of(part);
      part.end = std::min(part.end, part.begin + step_of(part));
      f(part, m);
    });
  }

  // f(rows, m, scores) likewise, with the scores of those rows.
  template <typename F>
  void for_each_scored(const F& f) const {
    const auto by_rows = MMFUSE_SIMD_SELECT(score_rows);
    const auto by_columns = MMFUSE_SIMD_SELECT(score_columns);
    for_each_part(Pass::kScores, [&](const LogitRows& part, size_t m) {
      double scores[3][kMaxTaskRows];
      const RowScores found{scores[0], scores[1], scores[2]};
      (part.classes_adjoin ? by_rows : by_columns)(part, found);
      f(part, m, found);
    });
  }

  // f(rows, m, statistics) likewise.
  template <typename F>
  void for_each_statistics(const F& f) const {
    const auto by_rows = MMFUSE_SIMD_SELECT(statistics_rows);
    const auto by_columns = MMFUSE_SIMD_SELECT(statistics_columns);
    for_each_part(Pass::kScores, [&](const LogitRows& part, size_t m) {
      double found[7][kMaxTaskRows];
      const RowStatistics one{
          {found[0], found[1], found[2]}, found[3], found[4], found[5], found[6]};
      (part.classes_adjoin ? by_rows : by_columns)(part, one);
      f(part, m, one);
    });
  }

  // Sums of w p, w log p and w of each modality, [M][3].
  std::vector<double> sums() const {
    return sums_of([&](const auto& f) { for_each_scored(f); });
  }

  // Sums of w where the label is the argmax, w p and w, likewise.
  std::vector<double> accurate_sums() const {
    return sums_of([&](const auto& f) {
      for_each_statistics([&](const LogitRows& part, size_t m, const RowStatistics& one) {
        f(part, m, RowScores{one.correct, one.scores.prob, one.scores.weight});
      });
    });
  }

  static int64_t step_of(const LogitRows& rows) {
    const int64_t step = kTaskElements / std::max<int64_t>(1, rows.classes);
    return std::clamp<int64_t>(step, rows.classes_adjoin ? 1 : kTaskColumns, kMaxTaskRows);
  }

 private:
  // [M][3] of what for_each gives for each part in the place of scores.
  template <typename F>
  std::vector<double> sums_of(const F& for_each) const {
    std::vector<double> found(3 * modalities.size());
    if (kept()) {
      // Row after row, to the same bit as ever.
      std::vector<double> scores(3 * modalities.size() * rows);
      for_each([&](const LogitRows& part, size_t m, const RowScores& one) {
        double* to = scores.data() + 3 * m * rows + 3 * part.begin;
        for (int64_t i = 0; i < part.end - part.begin; ++i) add(one, i, to + 3 * i);
      });
      for (size_t m = 0; m < modalities.size(); ++m) {
        const double* row = scores.data() + 3 * m * rows;
        double prob = 0, log_prob = 0, weight = 0;
        for (int64_t i = 0; i < rows; ++i, row += 3) {
          prob += row[0];
          log_prob += row[1];
          weight += row[2];
        }
        found[3 * m] = prob;
        found[3 * m + 1] = log_prob;
        found[3 * m + 2] = weight;
      }
      return found;
    }
    std::vector<std::vector<double>> parts(3 * modalities.size());
    for (size_t k = 0; k < parts.size(); ++k) {
      const LogitRows& all = modalities[k / 3];
      parts[k].resize((all.end + step_of(all) - 1) / step_of(all));
    }
    for_each([&](const LogitRows& part, size_t m, const RowScores& one) {
      double sum[3] = {};
      for (int64_t i = 0; i < part.end - part.begin; ++i) add(one, i, sum);
      for (int k = 0; k < 3; ++k) parts[3 * m + k][part.begin / step_of(part)] = sum[k];
    });
    for (size_t k = 0; k < parts.size(); ++k) {
      found[k] = pairwise_sum(parts[k].data(), parts[k].size());
    }
    return found;
  }

  // Scores of [B, C] logits with class indices are few, but for a B of millions, as [1, C, D] has.
  bool kept() const {
    constexpr int64_t kMostKept = int64_t{1} << 20;
    return modalities[0].kind == TargetKind::kIndices && modalities[0].inner == rows &&
           rows <= kMostKept;
  }

  static void add(const RowScores& one, int64_t i, double* sum) {
    sum[0] += one.weight[i] == 0 ? 0 : one.weight[i] * one.prob[i];
    sum[1] += one.weight[i] == 0 ? 0 : one.weight[i] * one.log_prob[i];
    sum[2] += one.weight[i];
  }

  static ClassWeights weights_of(const std::optional<Tensor>& weight, std::vector<float>& narrow,
                                 std::vector<double>& wide) {
    if (!weight.has_value()) return {};
    const double* data = static_cast<const double*>(weight->const_data_ptr());
    wide.assign(data, data + weight->numel());
    narrow.assign(wide.begin(), wide.end());
    wide.resize(wide.size() + kTermsPadding);
    narrow.resize(narrow.size() + kTermsPadding);
    return {narrow.data(), wide.data()};
  }
};

// Means [M] of the first and the second sum, by the third, which is also the last result.
std::tuple<Tensor, Tensor, Tensor> means_of(const std::vector<double>& sums,
                                            const TensorList& logits, ScalarType dtype) {
  const int64_t count = static_cast<int64_t>(logits.size());
  Tensor first = empty_on_cpu({count}, dtype);
  Tensor second = empty_on_cpu({count}, dtype);
  Tensor total = empty_on_cpu({}, ScalarType::Double);
  const Numbers firsts(first), seconds(second);
  for (int64_t m = 0; m < count; ++m) {
    // No row that counts: 0 / 0 is the NaN that is wanted.
    firsts.set(m, sums[3 * m] / sums[3 * m + 2]);
    seconds.set(m, sums[3 * m + 1] / sums[3 * m + 2]);
  }
  write_number(total, 0, sums[3 * widest(logits) + 2]);
  return {first, second, total};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> modality_scores(const TensorList& logits, const Tensor& labels,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& pos_weight,
                                                   int64_t ignore_index, bool multilabel) {
  const Call call(logits, labels, weight, pos_weight, ignore_index, multilabel);
  return means_of(call.sums(), logits, result_type(logits));
}

// Of class indices the weighted share of rows that are right, and prob.
std::tuple<Tensor, Tensor, Tensor> modality_accuracies(const TensorList& logits,
                                                       const Tensor& labels,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& pos_weight,
                                                       int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "mmfuse: labels must be int64");
  const Call call(logits, labels, weight, pos_weight, ignore_index, multilabel);
  return means_of(call.accurate_sums(), logits, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> sample_scores(const TensorList& logits, const Tensor& labels,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& pos_weight,
                                                 int64_t ignore_index, bool multilabel) {
  const Call call(logits, labels, weight, pos_weight, ignore_index, multilabel);
  const std::vector<int64_t> shape = shape_of_rows(labels);
  std::vector<int64_t> each{static_cast<int64_t>(logits.size())};
  each.insert(each.end(), shape.begin(), shape.end());
  Tensor prob = empty_on_cpu(each, result_type(logits));
  Tensor log_prob = empty_on_cpu(each, result_type(logits));
  Tensor weights = empty_on_cpu(shape, ScalarType::Double);
  const Numbers probs(prob), log_probs(log_prob);
  double* weight_data = static_cast<double*>(weights.mutable_data_ptr());
  call.for_each_scored([&](const LogitRows& part, size_t m, const RowScores& one) {
    for (int64_t i = 0; i < part.end - part.begin; ++i) {
      probs.set(m * call.rows + part.begin + i, one.prob[i]);
      log_probs.set(m * call.rows + part.begin + i, one.log_prob[i]);
      if (m == widest(logits)) weight_data[part.begin + i] = one.weight[i];
    }
  });
  return {prob, log_prob, weights};
}

// prob, log_prob, weights, and of class indices correct, entropy, log_sum_exp, abs_sum.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_statistics(
    const TensorList& logits, const Tensor& labels, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& pos_weight, int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "mmfuse: labels must be int64");
  const Call call(logits, labels, weight, pos_weight, ignore_index, multilabel);
  std::vector<int64_t> each{static_cast<int64_t>(logits.size())};
  for (const int64_t size : shape_of_rows(labels)) each.push_back(size);
  const ScalarType dtype = result_type(logits);
  Tensor prob = empty_on_cpu(each, dtype), log_prob = empty_on_cpu(each, dtype);
  Tensor weights = empty_on_cpu(shape_of_rows(labels), ScalarType::Double);
  Tensor correct = empty_on_cpu(each, ScalarType::Bool), entropy = empty_on_cpu(each, dtype);
  Tensor log_sum_exp = empty_on_cpu(each, dtype), abs_sum = empty_on_cpu(each, dtype);
  const Numbers probs(prob), log_probs(log_prob), entropies(entropy), sums(log_sum_exp),
      sizes(abs_sum);
  double* weight_data = static_cast<double*>(weights.mutable_data_ptr());
  bool* correct_data = static_cast<bool*>(correct.mutable_data_ptr());
  call.for_each_statistics([&](const LogitRows& part, size_t m, const RowStatistics& one) {
    for (int64_t i = 0; i < part.end - part.begin; ++i) {
      const size_t place = m * call.rows + part.begin + i;
      probs.set(place, one.scores.prob[i]);
      log_probs.set(place, one.scores.log_prob[i]);
      correct_data[place] = one.correct[i] != 0;
      entropies.set(place, one.entropy[i]);
      sums.set(place, one.log_sum_exp[i]);
      sizes.set(place, one.abs_sum[i]);
      if (m == widest(logits)) weight_data[part.begin + i] = one.scores.weight[i];
    }
  });
  return {prob, log_prob, weights, correct, entropy, log_sum_exp, abs_sum};
}

TensorList modality_scores_backward(const Tensor& grad_prob, const Tensor& grad_log_prob,
                                    const Tensor& count, const TensorList& logits,
                                    const Tensor& labels, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& pos_weight, int64_t ignore_index,
                                    bool multilabel) {
  const Call call(logits, labels, weight, pos_weight, ignore_index, multilabel);
  const Coefficients grad_probs(grad_prob, logits.size(), "grad_prob");
  const Coefficients grad_log_probs(grad_log_prob, logits.size(), "grad_log_prob");
  const double total = Coefficients(count, 1, "count")[0];
  TensorList grads;
  std::vector<RowGrads> calls;
  for (size_t m = 0; m < logits.size(); ++m) {
    grads.push_back(torch::stable::empty_like(logits[m]));
    const RowLayout layout = row_layout(grads[m]);
    STD_TORCH_CHECK(layout.classes_adjoin == call.modalities[m].classes_adjoin,
                    "mmfuse: the gradient would lie in another order than its logits");
    calls.push_back({grads[m].mutable_data_ptr(),
                     {layout.outer_stride, layout.class_stride, layout.inner_stride},
                     nullptr,
                     grad_probs[m] / total,
                     grad_log_probs[m] / total});
  }
  const auto by_rows = MMFUSE_SIMD_SELECT(grad_rows);
  const auto by_columns = MMFUSE_SIMD_SELECT(grad_columns);
  call.for_each_part(Pass::kGradients, [&](const LogitRows& part, size_t m) {
    const int64_t terms = part.kind == TargetKind::kLabels ? 0 : part.classes + kTermsPadding;
    const int64_t lists = part.classes_adjoin ? (part.kind == TargetKind::kShares ? 2 : 1) : 0;
    const std::unique_ptr<double[]> scratch(new double[lists * terms]);
    RowGrads one = calls[m];
    one.terms = scratch.get();
    (part.classes_adjoin ? by_rows : by_columns)(part, one);
  });
  return grads;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("modality_scores.cpu", TORCH_BOX(&mmfuse::cpu::modality_scores));
  m.impl("modality_scores_backward.cpu", TORCH_BOX(&mmfuse::cpu::modality_scores_backward));
  m.impl("modality_accuracies.cpu", TORCH_BOX(&mmfuse::cpu::modality_accuracies));
  m.impl("sample_statistics.cpu", TORCH_BOX(&mmfuse::cpu::sample_statistics));
  m.impl("sample_scores.cpu", TORCH_BOX(&mmfuse::cpu::sample_scores));
}
