#include "progress_factors.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> progress_factors(
    const Tensor& scores, const Tensor& last_scores, const Tensor& last_shares, const Tensor& owner,
    double rho, double bound, bool wide_scale) {
  ProgressFactorsParams call{};
  call.modalities = scores.size(0);
  call.tensors = owner.numel();
  const size_t modalities = static_cast<size_t>(call.modalities);
  call.scores = coefficients_of(scores, static_cast<size_t>(scores.numel()), "scores");
  call.table = scores.dim() == 2;
  call.last_scores = coefficients_of(last_scores, modalities * modalities, "last_scores");
  call.last_shares = coefficients_of(last_shares, modalities, "last_shares");
  call.owner = indices_of(owner, call.tensors, "owner");
  call.rule = {rho, bound};
  call.wide_scale = wide_scale;
  const DeviceScope device(scores);
  const ScalarType dtype = last_scores.scalar_type();
  Tensor coefficients = new_empty(scores, {call.modalities}, dtype);
  Tensor progress = new_empty(scores, {call.modalities}, dtype);
  Tensor shares = new_empty(scores, {call.modalities}, dtype);
  const ScalarType scale_dtype = wide_scale ? ScalarType::Double : ScalarType::Float;
  Tensor scale = new_empty(scores, {call.tensors}, scale_dtype);
  Tensor kept_scores = new_empty(scores, {call.modalities, call.modalities}, dtype);
  Tensor kept_shares = new_empty(scores, {call.modalities}, dtype);
  call.coefficients = coefficients.mutable_data_ptr();
  call.progress = progress.mutable_data_ptr();
  call.shares = shares.mutable_data_ptr();
  call.scale = scale.mutable_data_ptr();
  call.kept_scores = kept_scores.mutable_data_ptr();
  call.kept_shares = kept_shares.mutable_data_ptr();
  launch_progress_factors(call, device.stream());
  return {coefficients, progress, shares, scale, kept_scores, kept_shares};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("progress_factors.cuda", TORCH_BOX(&mmfuse::cuda::progress_factors));
}
