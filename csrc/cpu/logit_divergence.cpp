#include "logit_divergence.h"

#include <memory>

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/logit_divergence_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Enough rows to be worth a task of their own, and so few that their numbers fit on its stack.
constexpr int64_t kTaskElements = 8192;
constexpr int64_t kMaxTaskRows = 512;

// The pairs of a call, whose rows are shared out in tasks.
struct C10_HIDDEN Call {
  std::vector<LogitPair> pairs;
  DivergenceKind kind;
  int64_t rows;

  Call(const TensorList& first, const TensorList& second, int64_t kind)
      : kind(static_cast<DivergenceKind>(kind)), rows(first.empty() ? 0 : first[0].size(0)) {
    STD_TORCH_CHECK(!first.empty() && first.size() == second.size() && kind >= 0 && kind <= 2,
                    "mmfuse: first and second must be lists of one length, and the kind 0, 1 or 2");
    for (size_t k = 0; k < first.size(); ++k) {
      const Tensor &a = first[k], &b = second[k];
      STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == rows && b.size(0) == rows &&
                          a.size(1) == b.size(1) && a.size(1) > 1 &&
                          a.scalar_type() == b.scalar_type() && a.stride(1) == 1 &&
                          b.stride(1) == 1,
                      "mmfuse: logits must be [B, C], pairs of one shape and dtype, with classes "
                      "that adjoin in memory");
      pairs.push_back({dtype_of(a), a.const_data_ptr(), b.const_data_ptr(), a.stride(0),
                       b.stride(0), a.size(1)});
    }
  }

  static int64_t step_of(const LogitPair& pair) {
    return std::clamp<int64_t>(kTaskElements / pair.classes, 1, kMaxTaskRows);
  }

  // The cost of row k of both, and of a class of it besides.
  Nanoseconds cost_of(const LogitPair& pair, bool backward) const {
    const bool wide = pair.dtype == DType::kFloat64;
    const double row = backward ? 35 : 100;
    const double element = backward ? (wide ? 1.7 : 0.5) : (wide ? 13 : 1);
    return rows * ns(row + static_cast<double>(pair.classes) * element);
  }

  // f(k, begin, end) for stretches of the rows of each pair k.
  template <typename F>
  void for_each_part(bool backward, const F& f) const {
    std::vector<int64_t> first{0};
    Nanoseconds cost = ns(0);
    for (const LogitPair& pair : pairs) {
      cost = cost + cost_of(pair, backward);
      first.push_back(first.back() + (rows + step_of(pair) - 1) / step_of(pair));
    }
    parallel_each(first.back(), cost, [&](int64_t i) {
      const size_t k = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
      const int64_t step = step_of(pairs[k]), begin = (i - first[k]) * step;
      f(k, begin, std::min(rows, begin + step));
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> logit_divergence(const TensorList& first, const TensorList& second,
                                            int64_t kind, bool per_row) {
  const Call call(first, second, kind);
  const int64_t count = static_cast<int64_t>(first.size()), rows = call.rows;
  const ScalarType dtype = result_type(first);
  Tensor value = empty_on_cpu(
      per_row ? std::vector<int64_t>{count, rows} : std::vector<int64_t>{count}, dtype);
  Tensor numbers = empty_on_cpu({count, kRowNumbers, rows}, dtype);
  const Numbers values(value), each(numbers);
  std::vector<double> of_rows(per_row ? 0 : count * rows);
  const auto kernel = MMFUSE_SIMD_SELECT(divergence_rows);
  call.for_each_part(false, [&](size_t k, int64_t begin, int64_t end) {
    const LogitPair& pair = call.pairs[k];
    const std::unique_ptr<double[]> terms(new double[2 * (pair.classes + kTermsPadding)]);
    RowDivergence found[kMaxTaskRows];
    kernel(pair, call.kind, begin, end, terms.get(), found);
    for (int64_t row = begin; row < end; ++row) {
      const RowDivergence& one = found[row - begin];
      for (int i = 0; i < kRowNumbers; ++i) {
        each.set((k * kRowNumbers + i) * rows + row, one.numbers[i]);
      }
      if (per_row) {
        values.set(k * rows + row, one.value);
      } else {
        of_rows[k * rows + row] = one.value;
      }
    }
  });
  for (int64_t k = 0; k < count && !per_row; ++k) {
    // No row: 0 / 0 is the NaN that is wanted.
    values.set(k, pairwise_sum(of_rows.data() + k * rows, rows) / static_cast<double>(rows));
  }
  return {value, numbers};
}

TensorList logit_divergence_backward(const Tensor& grad, const Tensor& numbers,
                                     const TensorList& first, const TensorList& second,
                                     int64_t kind, bool to_first, bool to_second) {
  const Call call(first, second, kind);
  const int64_t rows = call.rows;
  const size_t count = first.size();
  const bool per_row = grad.dim() == 2;
  const Coefficients weights(grad, per_row ? count * rows : count, "grad");
  const Coefficients each(numbers, count * kRowNumbers * rows, "rows");
  TensorList grads;
  std::vector<PairGrads> calls(count);
  const auto add = [&](const Tensor& like) {
    const std::vector<int64_t> size{rows, like.size(1)};
    return grads.emplace_back(empty_on_cpu(size, like.scalar_type())).mutable_data_ptr();
  };
  for (size_t k = 0; k < count && to_first; ++k) calls[k].first = add(first[k]);
  for (size_t k = 0; k < count && to_second; ++k) calls[k].second = add(second[k]);
  const auto kernel = MMFUSE_SIMD_SELECT(divergence_grad_rows);
  call.for_each_part(true, [&](size_t k, int64_t begin, int64_t end) {
    double of_row[kMaxTaskRows][kRowNumbers], weight[kMaxTaskRows];
    for (int64_t row = begin; row < end; ++row) {
      for (int i = 0; i < kRowNumbers; ++i) {
        of_row[row - begin][i] = each[(k * kRowNumbers + i) * rows + row];
      }
      weight[row - begin] = per_row ? weights[k * rows + row] : weights[k] / rows;
    }
    kernel(call.pairs[k], call.kind, begin, end, of_row, weight, calls[k]);
  });
  return grads;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("logit_divergence.cpu", TORCH_BOX(&mmfuse::cpu::logit_divergence));
  m.impl("logit_divergence_backward.cpu", TORCH_BOX(&mmfuse::cpu::logit_divergence_backward));
}
