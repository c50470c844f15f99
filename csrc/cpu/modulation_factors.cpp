#include "common/modulation.h"
#include "glue/coefficients.h"

namespace mmfuse::cpu {

TensorList grad_stats_table(const Tensor& table, const Tensor& like, bool displaced);

// Ratios and coefficients [M], scale and noise's standard deviation [T]; [0] without statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_factors(
    const Tensor& scores, const Tensor& owner, const std::optional<Tensor>& numel,
    const std::optional<Tensor>& m2, double alpha, double beta, int64_t formula, double eps) {
  const int64_t modalities = scores.numel();
  const int64_t count = owner.numel();
  const Coefficients values(scores, modalities, "scores");
  const int64_t* owners = indices_of(owner, count, "owner");
  Tensor ratios = empty_on_cpu({modalities}, scores.scalar_type());
  Tensor coefficients = empty_on_cpu({modalities}, scores.scalar_type());
  const ModulationRule rule{alpha, beta, static_cast<ModulationFormula>(formula)};
  const Numbers leads(ratios), decided(coefficients);
  for (int64_t m = 0; m < modalities; ++m) {
    const auto score = [&](int64_t j) { return values[j]; };
    const double ratio = modulation_ratio(score, m, modalities, rule);
    leads.set(m, ratio);
    decided.set(m, modulation_coefficient(ratio, rule));
  }
  const Coefficients known(coefficients, modalities, "coefficients");
  const ScalarType dtype = m2 ? m2->scalar_type() : scores.scalar_type();
  Tensor scale = empty_on_cpu({count}, dtype);
  Tensor noise = empty_on_cpu({m2 ? count : 0}, dtype);
  const Numbers spread(scale);
  for (int64_t t = 0; t < count; ++t) spread.set(t, known[owners[t]]);
  if (m2) {
    STD_TORCH_CHECK(numel, "mmfuse: m2 needs numel");
    const int64_t* sizes = indices_of(*numel, count, "numel");
    const Coefficients moments(*m2, count, "m2");
    const Numbers stds(noise);
    for (int64_t t = 0; t < count; ++t) stds.set(t, modulation_noise(sizes[t], moments[t], eps));
  }
  return {ratios, coefficients, scale, noise};
}

// The same before an update: ratios, coefficients and scale, and `finite` for it; with a table of
// gradients, whose statistics are taken on the way, also the noise's standard deviation.
TensorList modulation_factors_table(const std::optional<Tensor>& table, const Tensor& scores,
                                    const Tensor& owner, double alpha, double beta, int64_t formula,
                                    double eps) {
  std::optional<Tensor> numel, m2;
  if (table) {
    const TensorList stats = grad_stats_table(*table, scores, false);
    numel = stats[0];
    m2 = stats[2];
  }
  const auto [ratios, coefficients, scale, noise] =
      modulation_factors(scores, owner, numel, m2, alpha, beta, formula, eps);
  Tensor finite = empty_on_cpu({}, ScalarType::Bool);
  *static_cast<bool*>(finite.mutable_data_ptr()) = true;
  TensorList all{ratios, coefficients, scale, finite};
  if (table) all.push_back(noise);
  return all;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("modulation_factors.cpu", TORCH_BOX(&mmfuse::cpu::modulation_factors));
  m.impl("modulation_factors_table.cpu", TORCH_BOX(&mmfuse::cpu::modulation_factors_table));
}
