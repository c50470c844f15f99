#include "discrepancy_ratios.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

Tensor discrepancy_ratios(const Tensor& scores) {
  const Coefficients values =
      coefficients_of(scores, static_cast<size_t>(scores.numel()), "scores");
  const DeviceScope device(scores);
  Tensor ratios = torch::stable::empty_like(scores);
  launch_discrepancy_ratios({values.values, ratios.mutable_data_ptr(), scores.numel(), values.wide},
                            device.stream());
  return ratios;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("discrepancy_ratios.cuda", TORCH_BOX(&mmfuse::cuda::discrepancy_ratios));
}
