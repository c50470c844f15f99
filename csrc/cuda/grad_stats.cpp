#include "grad_stats.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

std::tuple<Tensor, Tensor> launch(GradStatsParams& call, const Tensor& like, ScalarType dtype) {
  const DeviceScope device(like);
  const int64_t count = static_cast<int64_t>(call.tensors.size());
  Tensor numel = new_empty(like, {count}, ScalarType::Long);
  Tensor moments = new_empty(like, {call.has_params ? 4 : 2, count}, dtype);
  Tensor workspace = new_empty(like, {stats_rows(call.tensors), kStatsRow}, ScalarType::Double);
  call.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  call.numel = static_cast<int64_t*>(numel.mutable_data_ptr());
  call.moments = moments.mutable_data_ptr();
  call.wide = dtype == ScalarType::Double;
  launch_grad_stats(call, device.stream());
  return {numel, moments};
}

}  // namespace

std::tuple<Tensor, Tensor> grad_stats(const TensorList& grads, const TensorList& params,
                                      const TensorList& anchors) {
  STD_TORCH_CHECK(!grads.empty(), "mmfuse: grad_stats needs at least one gradient");
  GradStatsParams call;
  call.tensors = grad_tensors(grads, params, anchors, false);
  call.has_params = !params.empty();
  return launch(call, grads[0], result_type(grads));
}

// The same of a table, of displacements with its parameters, and anchors if it has any: numbers of
// elements, and each moment by itself. `like` says on which device.
TensorList grad_stats_table(const Tensor& table, const Tensor& like, bool displaced) {
  const Rows rows(table, displaced);
  STD_TORCH_CHECK(rows.size() > 0, "mmfuse: grad_stats needs at least one gradient");
  GradStatsParams call;
  call.tensors = grad_tensors(rows, displaced);
  call.has_params = displaced;
  const auto [numel, moments] =
      launch(call, like, rows.wide() ? ScalarType::Double : ScalarType::Float);
  return with_rows(numel, moments);
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("grad_stats.cuda", TORCH_BOX(&mmfuse::cuda::grad_stats));
  m.impl("grad_stats_table.cuda", TORCH_BOX(&mmfuse::cuda::grad_stats_table));
}
