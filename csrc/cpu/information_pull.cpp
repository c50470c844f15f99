#include "common/information.h"
#include "glue/coefficients.h"
#include "glue/kept.h"

namespace mmfuse::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> information_pull(
    const Tensor& scores, const std::optional<Tensor>& count, const Tensor& window_open,
    const Tensor& steps, const Tensor& owner, double beta,
    const std::optional<Tensor>& multipliers) {
  const int64_t modalities = scores.size(0);
  const int64_t tensors = owner.numel();
  const Coefficients numbers(scores, scores.numel(), "scores");
  std::optional<Coefficients> counts;
  std::optional<Coefficients> factors;
  const bool single = count && count->numel() == 1;
  if (count) counts.emplace(*count, single ? 1 : scores.numel(), "count");
  if (multipliers) factors.emplace(*multipliers, modalities, "multipliers");
  const bool* open = flags_of(window_open, modalities, "window_open");
  const int64_t* before = indices_of(steps, modalities, "steps");
  const int64_t* owners = indices_of(owner, tensors, "owner");
  const ScalarType dtype = scores.scalar_type();
  Tensor coefficients = empty_on_cpu({modalities}, dtype);
  Tensor gaps = empty_on_cpu({modalities}, ScalarType::Double);
  Tensor counted = empty_on_cpu({modalities}, ScalarType::Long);
  Tensor scale = empty_on_cpu({tensors}, dtype);
  Tensor pull = empty_on_cpu({tensors}, dtype);
  const auto score = [&](int64_t i) {
    return counts ? rounded_product(numbers[i], (*counts)[single ? 0 : i]) : numbers[i];
  };
  const bool table = scores.dim() == 2;
  const Compared<decltype(score)> compared{score, modalities, table};
  const Numbers found(coefficients);
  double* gap = static_cast<double*>(gaps.mutable_data_ptr());
  int64_t* after = static_cast<int64_t*>(counted.mutable_data_ptr());
  for (int64_t m = 0; m < modalities; ++m) {
    gap[m] = information_gap(compared, m);
    found.set(m, information_strength(gap[m], open[m], beta, factors ? (*factors)[m] : 1.0));
    // Without its count, which may be NaN where there is a score.
    after[m] = before[m] + (table && isnan(numbers[m * modalities + m]) ? 0 : 1);
  }
  const Coefficients known(coefficients, modalities, "coefficients");
  const Numbers ones(scale);
  const Numbers pulls(pull);
  for (int64_t t = 0; t < tensors; ++t) {
    ones.set(t, 1.0);
    pulls.set(t, known[owners[t]]);
  }
  return {coefficients, gaps, counted, scale, pull};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("information_pull.cpu", TORCH_BOX(&mmfuse::cpu::information_pull));
}
