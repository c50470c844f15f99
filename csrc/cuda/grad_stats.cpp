#include "grad_stats.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor> grad_stats(const TensorList& grads, const TensorList& params,
                                      const TensorList& anchors) {
  STD_TORCH_CHECK(!grads.empty(), "mmfuse: grad_stats needs at least one gradient");
  GradStatsParams call;
  call.tensors = grad_tensors(grads, params, anchors, false);
  call.has_params = !params.empty();
  const DeviceScope device(grads[0]);
  const int64_t count = static_cast<int64_t>(grads.size());
  const ScalarType dtype = result_type(grads);
  Tensor numel = new_empty(grads[0], {count}, ScalarType::Long);
  Tensor moments = new_empty(grads[0], {call.has_params ? 4 : 2, count}, dtype);
  Tensor workspace = new_empty(grads[0], {stats_rows(call.tensors), kStatsRow}, ScalarType::Double);
  call.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  call.numel = static_cast<int64_t*>(numel.mutable_data_ptr());
  call.moments = moments.mutable_data_ptr();
  call.wide = dtype == ScalarType::Double;
  launch_grad_stats(call, device.stream());
  return {numel, moments};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("grad_stats.cuda", TORCH_BOX(&mmfuse::cuda::grad_stats));
}
