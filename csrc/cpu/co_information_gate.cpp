#include "glue/coefficients.h"
#include "paired_cosine.h"

namespace mmfuse::cpu {

Tensor co_information_gate(const TensorList& features, const Tensor& threshold) {
  STD_TORCH_CHECK(features.size() >= 2, "mmfuse: a gate needs at least two features");
  check_contiguous(features, "features");
  const Tensor& first = features[0];
  const DType dtype = dtype_of(first);
  std::vector<const void*> data;
  for (const Tensor& feature : features) {
    STD_TORCH_CHECK(dtype_of(feature) == dtype && first.dim() == 2 && feature.dim() == 2 &&
                        feature.size(0) == first.size(0) && feature.size(1) == first.size(1),
                    "mmfuse: features must be [B, D], of one dtype and shape");
    data.push_back(feature.const_data_ptr());
  }
  double cosine = mean_cosine(dtype, data, first.size(0), first.size(1));
  // The threshold is compared with the number that paired_cosine would return.
  if (dtype != DType::kFloat64) cosine = static_cast<float>(cosine);
  return number_on_cpu(cosine > Coefficients(threshold, 1, "threshold")[0], dtype);
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("co_information_gate.cpu", TORCH_BOX(&mmfuse::cpu::co_information_gate));
}
