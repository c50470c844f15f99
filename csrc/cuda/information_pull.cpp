#include "information_pull.h"

#include "glue/cuda_tensors.h"
#include "glue/kept.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> information_pull(
    const Tensor& scores, const std::optional<Tensor>& count, const Tensor& window_open,
    const Tensor& steps, const Tensor& owner, double beta,
    const std::optional<Tensor>& multipliers) {
  InformationPullParams call{};
  call.modalities = scores.size(0);
  call.tensors = owner.numel();
  const size_t numbers = static_cast<size_t>(scores.numel());
  call.scores = coefficients_of(scores, numbers, "scores");
  call.table = scores.dim() == 2;
  if (count) {
    call.one_count = count->numel() == 1;
    call.counts = coefficients_of(*count, call.one_count ? 1 : numbers, "count");
  }
  call.open = flags_of(window_open, call.modalities, "window_open");
  call.steps = indices_of(steps, call.modalities, "steps");
  call.owner = indices_of(owner, call.tensors, "owner");
  call.beta = beta;
  if (multipliers) {
    call.multipliers =
        coefficients_of(*multipliers, static_cast<size_t>(call.modalities), "multipliers");
  }
  const DeviceScope device(scores);
  const ScalarType dtype = scores.scalar_type();
  Tensor coefficients = new_empty(scores, {call.modalities}, dtype);
  Tensor gap = new_empty(scores, {call.modalities}, ScalarType::Double);
  Tensor counted = new_empty(scores, {call.modalities}, ScalarType::Long);
  Tensor scale = new_empty(scores, {call.tensors}, dtype);
  Tensor pull = new_empty(scores, {call.tensors}, dtype);
  call.coefficients = coefficients.mutable_data_ptr();
  call.gap = static_cast<double*>(gap.mutable_data_ptr());
  call.counted = static_cast<int64_t*>(counted.mutable_data_ptr());
  call.scale = scale.mutable_data_ptr();
  call.pull = pull.mutable_data_ptr();
  launch_information_pull(call, device.stream());
  return {coefficients, gap, counted, scale, pull};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("information_pull.cuda", TORCH_BOX(&mmfuse::cuda::information_pull));
}
