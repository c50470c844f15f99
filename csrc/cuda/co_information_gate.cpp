#include "co_information_gate.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

Tensor co_information_gate(const TensorList& features, const Tensor& threshold) {
  check_contiguous(features, "features");
  STD_TORCH_CHECK(features.size() >= 2, "mmfuse: a gate needs at least two features");
  const Tensor& first = features[0];
  for (const Tensor& feature : features) {
    STD_TORCH_CHECK(feature.dim() == 2 && feature.size(0) == first.size(0) &&
                        feature.size(1) == first.size(1) &&
                        feature.scalar_type() == first.scalar_type(),
                    "mmfuse: features must be [B, D], of one shape and one dtype");
  }
  const DeviceScope device(first);
  CoInformationGateParams call;
  for (size_t m = 0; m < features.size(); ++m) {
    for (size_t j = m + 1; j < features.size(); ++j) {
      call.sums.pairs.push_back({features[m].const_data_ptr(), features[j].const_data_ptr()});
    }
  }
  call.sums.rows = first.size(0);
  call.sums.columns = first.size(1);
  call.sums.dtype = dtype_of(first);
  const int64_t pairs = static_cast<int64_t>(call.sums.pairs.size());
  const int64_t blocks = cosine_blocks(first.size(0), first.size(1));
  Tensor gate = new_empty(first, {}, result_type(features));
  Tensor partials = new_empty(first, {pairs, blocks}, ScalarType::Double);
  call.sums.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.threshold = coefficients_of(threshold, 1, "threshold");
  call.gate = gate.mutable_data_ptr();
  launch_co_information_gate(call, device.stream());
  return gate;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("co_information_gate.cuda", TORCH_BOX(&mmfuse::cuda::co_information_gate));
}
