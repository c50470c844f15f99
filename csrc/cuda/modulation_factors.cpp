#include "modulation_factors.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_factors(
    const Tensor& scores, const Tensor& owner, const std::optional<Tensor>& numel,
    const std::optional<Tensor>& m2, double alpha, double beta, int64_t formula, double eps) {
  ModulationFactorsParams call{};
  call.modalities = scores.numel();
  call.tensors = owner.numel();
  call.scores = coefficients_of(scores, static_cast<size_t>(call.modalities), "scores");
  call.owner = indices_of(owner, call.tensors, "owner");
  if (m2) {
    STD_TORCH_CHECK(numel, "mmfuse: m2 needs numel");
    call.numel = indices_of(*numel, call.tensors, "numel");
    call.m2 = coefficients_of(*m2, static_cast<size_t>(call.tensors), "m2");
  }
  call.rule = {alpha, beta, static_cast<ModulationFormula>(formula)};
  call.eps = eps;
  const DeviceScope device(scores);
  const Tensor& like = m2 ? *m2 : scores;
  Tensor ratios = new_empty(scores, {call.modalities}, scores.scalar_type());
  Tensor coefficients = new_empty(scores, {call.modalities}, scores.scalar_type());
  Tensor scale = new_empty(like, {call.tensors}, like.scalar_type());
  Tensor noise = new_empty(like, {m2 ? call.tensors : 0}, like.scalar_type());
  call.ratios = ratios.mutable_data_ptr();
  call.coefficients = coefficients.mutable_data_ptr();
  call.scale = scale.mutable_data_ptr();
  call.noise_std = noise.mutable_data_ptr();
  call.wide_factors = like.scalar_type() == ScalarType::Double;
  launch_modulation_factors(call, device.stream());
  return {ratios, coefficients, scale, noise};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("modulation_factors.cuda", TORCH_BOX(&mmfuse::cuda::modulation_factors));
}
