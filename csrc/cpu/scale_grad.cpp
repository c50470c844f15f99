#include "cpu/simd/update.h"
#include "glue/coefficients.h"

namespace mmfuse::cpu {

Tensor scale_grad_backward(const Tensor& grad, const Tensor& coefficient,
                           const std::optional<Tensor>& noise_std,
                           const std::optional<Tensor>& noise_state, int64_t noise_id,
                           int64_t noise_offset) {
  STD_TORCH_CHECK(grad.is_contiguous(), "mmfuse: the gradient must be contiguous");
  Tensor out = torch::stable::empty_like(grad);
  UpdateSlice slice{};
  slice.dtype = dtype_of(grad);
  slice.in = grad.const_data_ptr();
  slice.out = out.mutable_data_ptr();
  slice.size = grad.numel();
  slice.scale = Coefficients(coefficient, 1, "coefficient")[0];
  if (noise_std) {
    STD_TORCH_CHECK(noise_state.has_value(), "mmfuse: noise_std needs noise_state");
    slice.noise_std = Coefficients(*noise_std, 1, "noise_std")[0];
    slice.noise_key = noise_key(noise_state_of(*noise_state), noise_id);
    slice.noise_offset = noise_offset;
  }
  std::vector<UpdateSlice> one{slice};
  launch_update(one, false);
  return out;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("scale_grad_backward.cpu", TORCH_BOX(&mmfuse::cpu::scale_grad_backward));
}
