#include "joint_entropies.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor> joint_entropies(const TensorList& data,
                                           const std::vector<int64_t>& tuples, int64_t order,
                                           int64_t bins) {
  STD_TORCH_CHECK(
      !data.empty() && (order == 2 || order == 3) && bins >= 1 && bins <= (order == 2 ? 256 : 32),
      "mmfuse: joint_entropies needs data, order 2 or 3, and at most 256 or 32 bins");
  check_contiguous(data, "the variables");
  const Tensor& first = data[0];
  const int64_t count = static_cast<int64_t>(data.size());
  JointEntropiesParams call{};
  for (const Tensor& x : data) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == first.size(0) && x.size(1) == first.size(1) &&
                        x.scalar_type() == first.scalar_type(),
                    "mmfuse: the variables must be [P, N], of one shape and one dtype");
    call.data.push_back(x.const_data_ptr());
  }
  for (const int64_t k : tuples) {
    STD_TORCH_CHECK(k >= 0 && k < count, "mmfuse: tuples must index the variables");
  }
  STD_TORCH_CHECK(tuples.size() % order == 0, "mmfuse: tuples must hold whole tuples");
  const DeviceScope device(first);
  call.tuples = tuples;
  call.order = static_cast<int>(order);
  call.bins = static_cast<int>(bins);
  call.problems = first.size(0);
  call.columns = first.size(1);
  call.dtype = dtype_of(first);
  const int64_t rows = static_cast<int64_t>(tuples.size()) / order;
  const int64_t cells = order == 2 ? bins * bins : bins * bins * bins;
  Tensor entropies =
      new_empty(first, {rows, call.problems, (int64_t{1} << order) - 1}, ScalarType::Double);
  Tensor counts = new_empty(first, {rows, call.problems, cells}, ScalarType::Long);
  call.entropies = static_cast<double*>(entropies.mutable_data_ptr());
  call.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::optional<Tensor> ranges;
  if (!block_per_problem(call)) {
    torch::stable::zero_(counts);
    const int64_t parts = chunk_count(call.columns, range_chunk(call.columns));
    ranges = new_empty(first, {count, call.problems, parts, 2}, ScalarType::Double);
    call.ranges = static_cast<double*>(ranges->mutable_data_ptr());
  }
  launch_joint_entropies(call, device.stream());
  return {entropies, counts};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("joint_entropies.cuda", TORCH_BOX(&mmfuse::cuda::joint_entropies));
}
