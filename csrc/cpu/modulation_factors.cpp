#include "common/modulation.h"
#include "glue/coefficients.h"

namespace mmfuse::cpu {

std::tuple<Tensor, Tensor> modulation_factors(const Tensor& scores, const Tensor& owner,
                                              const std::optional<Tensor>& numel,
                                              const std::optional<Tensor>& m2, double alpha,
                                              bool cvpr, double eps) {
  const int64_t modalities = scores.numel();
  const int64_t count = owner.numel();
  const Coefficients values(scores, modalities, "scores");
  const int64_t* owners = indices_of(owner, count, "owner");
  Tensor found = empty_on_cpu({2, modalities}, scores.scalar_type());
  const Numbers decided(found);
  for (int64_t m = 0; m < modalities; ++m) {
    const double ratio = discrepancy_ratio([&](int64_t j) { return values[j]; }, m, modalities);
    decided.set(m, ratio);
    decided.set(modalities + m, modulation_coefficient(ratio, {alpha, cvpr}));
  }
  const Coefficients known(found, 2 * modalities, "coefficients");
  Tensor factors = empty_on_cpu({m2 ? 2 : 1, count}, m2 ? m2->scalar_type() : scores.scalar_type());
  const Numbers spread(factors);
  for (int64_t t = 0; t < count; ++t) spread.set(t, known[modalities + owners[t]]);
  if (m2) {
    STD_TORCH_CHECK(numel, "mmfuse: m2 needs numel");
    const int64_t* sizes = indices_of(*numel, count, "numel");
    const Coefficients moments(*m2, count, "m2");
    for (int64_t t = 0; t < count; ++t) {
      spread.set(count + t, modulation_noise(sizes[t], moments[t], eps));
    }
  }
  return {found, factors};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("modulation_factors.cpu", TORCH_BOX(&mmfuse::cpu::modulation_factors));
}
