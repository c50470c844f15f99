#include "redundancy_ratio.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

Tensor redundancy_ratio(const Tensor& z1, const Tensor& z2, const Tensor& input_sq) {
  check_contiguous({z1, z2}, "representations");
  STD_TORCH_CHECK(z1.numel() == z2.numel() && z1.scalar_type() == z2.scalar_type(),
                  "mmfuse: z1 and z2 must have one size and one dtype");
  const DeviceScope device(z1);
  const int64_t numel = z1.numel();
  Tensor ratio = new_empty(z1, {}, result_type({z1}));
  Tensor partials =
      new_empty(z1, {chunk_count(numel, redundancy_chunk(numel))}, ScalarType::Double);
  RedundancyRatioParams call{};
  call.z1 = z1.const_data_ptr();
  call.z2 = z2.const_data_ptr();
  call.numel = numel;
  call.dtype = dtype_of(z1);
  call.input_sq = coefficients_of(input_sq, 1, "input_sq");
  call.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.ratio = ratio.mutable_data_ptr();
  launch_redundancy_ratio(call, device.stream());
  return ratio;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("redundancy_ratio.cuda", TORCH_BOX(&mmfuse::cuda::redundancy_ratio));
}
