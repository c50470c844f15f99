#include "modality_scores.h"

#include <limits>

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/modality_scores_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Enough rows to be worth a task of their own.
constexpr int64_t kTaskElements = 16384;

const int64_t* labels_of(const Tensor& labels) {
  STD_TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == ScalarType::Long,
                  "mmfuse: labels must be contiguous int64");
  return static_cast<const int64_t*>(labels.const_data_ptr());
}

std::vector<LogitRows> rows_of(const TensorList& logits, const Tensor& labels) {
  check_contiguous(logits, "logits");
  const int64_t* label_data = labels_of(labels);
  const int64_t rows = labels.numel();
  std::vector<LogitRows> modalities;
  for (const Tensor& tensor : logits) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows,
                    "mmfuse: logits must be [B, C] with one label a row");
    modalities.push_back(
        {dtype_of(tensor), tensor.const_data_ptr(), label_data, tensor.size(1), 0, rows});
  }
  return modalities;
}

int64_t count_valid(const Tensor& labels) {
  const int64_t* data = labels_of(labels);
  const int64_t rows = labels.numel();
  return rows - std::count(data, data + rows, kIgnoredLabel);
}

// f(rows, m) for every modality m, in parts of its rows.
template <typename F>
void for_each_part(const std::vector<LogitRows>& modalities, const F& f) {
  std::vector<std::pair<LogitRows, size_t>> parts;
  int64_t elements = 0;
  for (size_t m = 0; m < modalities.size(); ++m) {
    const LogitRows& all = modalities[m];
    elements += all.end * all.classes;
    const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, all.classes));
    for (int64_t begin = 0; begin < all.end; begin += step) {
      LogitRows part = all;
      part.begin = begin;
      part.end = std::min(all.end, begin + step);
      parts.emplace_back(part, m);
    }
  }
  parallel_each(static_cast<int64_t>(parts.size()), elements,
                [&](int64_t i) { f(parts[i].first, parts[i].second); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> modality_scores(const TensorList& logits, const Tensor& labels,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& pos_weight,
                                                   int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(!weight && !pos_weight && ignore_index == -100 && !multilabel,
                  "mmfuse: class indices only");
  const std::vector<LogitRows> modalities = rows_of(logits, labels);
  const size_t count = logits.size(), rows = labels.numel();
  // Zero for the rows that are ignored.
  std::vector<double> scores(2 * count * rows);
  const auto kernel = MMFUSE_SIMD_SELECT(score_rows);
  for_each_part(modalities, [&](const LogitRows& part, size_t m) {
    double* prob = scores.data() + 2 * m * rows;
    kernel(part, {prob, prob + rows});
  });

  const double valid = static_cast<double>(count_valid(labels));
  const ScalarType dtype = result_type(logits);
  Tensor prob = empty_on_cpu({static_cast<int64_t>(count)}, dtype);
  Tensor log_prob = empty_on_cpu({static_cast<int64_t>(count)}, dtype);
  for (size_t m = 0; m < count; ++m) {
    const double* row = scores.data() + 2 * m * rows;
    double sum = 0, log_sum = 0;
    for (size_t i = 0; i < rows; ++i) {
      sum += row[i];
      log_sum += row[rows + i];
    }
    // No valid row: 0 / 0 is the NaN that is wanted.
    write_number(prob, m, sum / valid);
    write_number(log_prob, m, log_sum / valid);
  }
  Tensor total = empty_on_cpu({}, ScalarType::Double);
  write_number(total, 0, valid);
  return {prob, log_prob, total};
}

TensorList modality_scores_backward(const Tensor& grad_prob, const Tensor& grad_log_prob,
                                    const Tensor&, const TensorList& logits,
                                    const Tensor& labels, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& pos_weight, int64_t ignore_index,
                                    bool multilabel) {
  STD_TORCH_CHECK(!weight && !pos_weight && ignore_index == -100 && !multilabel,
                  "mmfuse: class indices only");
  const std::vector<LogitRows> modalities = rows_of(logits, labels);
  const Coefficients grad_probs(grad_prob, logits.size(), "grad_prob");
  const Coefficients grad_log_probs(grad_log_prob, logits.size(), "grad_log_prob");
  TensorList grads;
  std::vector<void*> grad_data;
  for (const Tensor& tensor : logits) {
    grads.push_back(torch::stable::empty_like(tensor));
    grad_data.push_back(grads.back().mutable_data_ptr());
  }
  const double valid = static_cast<double>(count_valid(labels));
  const auto kernel = MMFUSE_SIMD_SELECT(grad_rows);
  for_each_part(modalities, [&](const LogitRows& part, size_t m) {
    std::vector<double> terms(part.classes + kTermsPadding);
    kernel(part, {grad_data[m], terms.data(), grad_probs[m] / valid, grad_log_probs[m] / valid});
  });
  return grads;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("modality_scores.cpu", TORCH_BOX(&mmfuse::cpu::modality_scores));
  m.impl("modality_scores_backward.cpu", TORCH_BOX(&mmfuse::cpu::modality_scores_backward));
}
