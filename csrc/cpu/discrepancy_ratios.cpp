#include "glue/tensors.h"

namespace mmfuse::cpu {

template <typename scalar_t>
void discrepancy_ratios_kernel(const scalar_t* scores, int64_t count, scalar_t* ratios) {
  for (int64_t m = 0; m < count; ++m) {
    scalar_t sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (j != m) sum += scores[m] / scores[j];
    }
    ratios[m] = sum / static_cast<scalar_t>(count - 1);
  }
}

Tensor discrepancy_ratios(const Tensor& scores) {
  STD_TORCH_CHECK(scores.is_contiguous(), "mmfuse: scores must be contiguous");
  Tensor ratios = torch::stable::empty_like(scores);
  const void* in = scores.const_data_ptr();
  void* out = ratios.mutable_data_ptr();
  const int64_t count = scores.numel();
  if (scores.scalar_type() == ScalarType::Double) {
    discrepancy_ratios_kernel(static_cast<const double*>(in), count, static_cast<double*>(out));
  } else {
    STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float,
                    "mmfuse: scores must be float32 or float64");
    discrepancy_ratios_kernel(static_cast<const float*>(in), count, static_cast<float*>(out));
  }
  return ratios;
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("discrepancy_ratios.cpu", TORCH_BOX(&mmfuse::cpu::discrepancy_ratios));
}
