#include "modulation_factors.h"

#include "cuda/grad_stats.h"
#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

struct Decision {
  ModulationFactorsParams call{};
  Tensor ratios, coefficients, scale, noise;
};

// `dtype`: of what there is for each tensor.
Decision decision_of(const Tensor& scores, const Tensor& owner, const ModulationRule& rule,
                     double eps, bool noisy, ScalarType dtype) {
  const int64_t modalities = scores.numel(), count = owner.numel();
  Decision made{{},
                new_empty(scores, {modalities}, scores.scalar_type()),
                new_empty(scores, {modalities}, scores.scalar_type()),
                new_empty(scores, {count}, dtype),
                new_empty(scores, {noisy ? count : 0}, dtype)};
  ModulationFactorsParams& call = made.call;
  call.modalities = modalities;
  call.tensors = count;
  call.scores = coefficients_of(scores, static_cast<size_t>(modalities), "scores");
  call.owner = indices_of(owner, count, "owner");
  call.rule = rule;
  call.eps = eps;
  call.ratios = made.ratios.mutable_data_ptr();
  call.coefficients = made.coefficients.mutable_data_ptr();
  call.scale = made.scale.mutable_data_ptr();
  call.noise_std = made.noise.mutable_data_ptr();
  call.wide_factors = dtype == ScalarType::Double;
  return made;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_factors(
    const Tensor& scores, const Tensor& owner, const std::optional<Tensor>& numel,
    const std::optional<Tensor>& m2, double alpha, double beta, int64_t formula, double eps) {
  const DeviceScope device(scores);
  Decision made = decision_of(scores, owner, {alpha, beta, static_cast<ModulationFormula>(formula)},
                              eps, m2.has_value(), (m2 ? *m2 : scores).scalar_type());
  if (m2) {
    STD_TORCH_CHECK(numel, "mmfuse: m2 needs numel");
    made.call.numel = indices_of(*numel, made.call.tensors, "numel");
    made.call.m2 = coefficients_of(*m2, static_cast<size_t>(made.call.tensors), "m2");
  }
  launch_modulation_factors(made.call, device.stream());
  return {made.ratios, made.coefficients, made.scale, made.noise};
}

// The same before an update: ratios, coefficients and scale, and `finite` for it; with a table of
// gradients, whose statistics are taken on the way, also the noise's standard deviation and `done`.
TensorList modulation_factors_table(const std::optional<Tensor>& table, const Tensor& scores,
                                    const Tensor& owner, double alpha, double beta, int64_t formula,
                                    double eps) {
  const DeviceScope device(scores);
  GradStatsParams stats{};
  ScalarType dtype = scores.scalar_type();
  if (table) {
    const Rows rows(*table);
    STD_TORCH_CHECK(static_cast<int64_t>(rows.size()) == owner.numel() && rows.size() > 0,
                    "mmfuse: modulation_factors needs an owner for each gradient of the table");
    stats.tensors = grad_tensors(rows, false);
    stats.wide = rows.wide();
    dtype = stats.wide ? ScalarType::Double : ScalarType::Float;
  }
  Decision made = decision_of(scores, owner, {alpha, beta, static_cast<ModulationFormula>(formula)},
                              eps, table.has_value(), dtype);
  Tensor finite = new_empty(scores, {}, ScalarType::Bool);
  made.call.finite = static_cast<bool*>(finite.mutable_data_ptr());
  TensorList all{made.ratios, made.coefficients, made.scale, finite};
  if (!table) {
    launch_modulation_factors(made.call, device.stream());
    return all;
  }
  Tensor done = new_empty(scores, {1}, ScalarType::Int);
  Tensor workspace = new_empty(scores, {stats_rows(stats.tensors), kStatsRow}, ScalarType::Double);
  made.call.done = static_cast<int32_t*>(done.mutable_data_ptr());
  stats.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  stats.decision = &made.call;
  launch_grad_stats(stats, device.stream());
  all.push_back(made.noise);
  all.push_back(done);
  return all;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("modulation_factors.cuda", TORCH_BOX(&mmfuse::cuda::modulation_factors));
  m.impl("modulation_factors_table.cuda", TORCH_BOX(&mmfuse::cuda::modulation_factors_table));
}
