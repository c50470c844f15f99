#include "glue/tensors.h"

namespace mmfuse::cpu {

template <typename scalar_t>
void scaled_sum_kernel(const void* a, const void* b, const void* factor, int64_t count, void* out) {
  const scalar_t scale = *static_cast<const scalar_t*>(factor);
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t added = scale * static_cast<const scalar_t*>(b)[i];
    static_cast<scalar_t*>(out)[i] = static_cast<const scalar_t*>(a)[i] + added;
  }
}

Tensor scaled_sum(const Tensor& a, const Tensor& b, const Tensor& factor) {
  check_contiguous({a, b}, "a and b");
  Tensor out = torch::stable::empty_like(a);
  const auto kernel =
      a.scalar_type() == ScalarType::Double ? scaled_sum_kernel<double> : scaled_sum_kernel<float>;
  kernel(a.const_data_ptr(), b.const_data_ptr(), factor.const_data_ptr(), a.numel(),
         out.mutable_data_ptr());
  return out;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("scaled_sum.cpu", TORCH_BOX(&mmfuse::cpu::scaled_sum));
}
