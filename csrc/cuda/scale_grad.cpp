#include "scale_grad.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

Tensor scale_grad_backward(const Tensor& grad, const Tensor& coefficient,
                           const std::optional<Tensor>& noise_std,
                           const std::optional<Tensor>& noise_state, int64_t noise_id,
                           int64_t noise_offset) {
  STD_TORCH_CHECK(grad.is_contiguous(), "mmfuse: the gradient must be contiguous");
  const DeviceScope device(grad);
  Tensor out = torch::stable::empty_like(grad);
  ScaleGradParams call{};
  call.grad = grad.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.numel = grad.numel();
  call.dtype = dtype_of(grad);
  call.coefficient = coefficients_of(coefficient, 1, "coefficient");
  if (noise_std) {
    call.noise_std = coefficients_of(*noise_std, 1, "noise_std");
    call.noise_state = noise_state_of(noise_state);
    call.noise_id = static_cast<uint32_t>(noise_id);
    call.noise_offset = noise_offset;
  }
  launch_scale_grad_backward(call, device.stream());
  return out;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("scale_grad_backward.cuda", TORCH_BOX(&mmfuse::cuda::scale_grad_backward));
}
