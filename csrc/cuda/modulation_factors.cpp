#include "modulation_factors.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor> modulation_factors(const Tensor& scores, const Tensor& owner,
                                              const std::optional<Tensor>& numel,
                                              const std::optional<Tensor>& m2, double alpha,
                                              bool cvpr, double eps) {
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
  call.rule = {alpha, cvpr};
  call.eps = eps;
  const DeviceScope device(scores);
  const Tensor& like = m2 ? *m2 : scores;
  Tensor found = new_empty(scores, {2, call.modalities}, scores.scalar_type());
  Tensor factors = new_empty(like, {m2 ? 2 : 1, call.tensors}, like.scalar_type());
  call.found = {found.mutable_data_ptr(), call.scores.wide};
  call.factors = {factors.mutable_data_ptr(), like.scalar_type() == ScalarType::Double};
  launch_modulation_factors(call, device.stream());
  return {found, factors};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("modulation_factors.cuda", TORCH_BOX(&mmfuse::cuda::modulation_factors));
}
