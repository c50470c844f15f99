#include "scaled_sum.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

Tensor scaled_sum(const Tensor& a, const Tensor& b, const Tensor& factor) {
  check_contiguous({a, b}, "a and b");
  const Coefficients scale = coefficients_of(factor, 1, "factor");
  const DeviceScope device(a);
  Tensor out = torch::stable::empty_like(a);
  launch_scaled_sum({a.const_data_ptr(), b.const_data_ptr(), scale.values, out.mutable_data_ptr(),
                     a.numel(), scale.wide},
                    device.stream());
  return out;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("scaled_sum.cuda", TORCH_BOX(&mmfuse::cuda::scaled_sum));
}
