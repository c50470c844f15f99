// Checks of soft_entropies, for every backend of C++.
#pragma once

#include "tensors.h"

namespace mmfuse {

inline void check_soft_pairs(const Tensor& x, const Tensor& y, int64_t bins,
                             const std::optional<Tensor>& present) {
  check_contiguous({x, y}, "values");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) &&
                      x.size(1) == y.size(1) && x.size(1) > 0 &&
                      x.scalar_type() == y.scalar_type() && x.scalar_type() == result_type({x}),
                  "mmfuse: x and y must be [P, N], of one shape, both float32 or both float64");
  STD_TORCH_CHECK(bins >= 2 && bins <= 256, "mmfuse: bins must be from 2 to 256, got ", bins);
  STD_TORCH_CHECK(
      !present.has_value() ||
          (present->is_contiguous() && present->scalar_type() == ScalarType::Bool &&
           present->dim() == 2 && present->size(0) == x.size(0) && present->size(1) == x.size(1)),
      "mmfuse: present must be bool, contiguous, of the values' shape");
}

inline void check_soft_gradient(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                int64_t bins) {
  check_contiguous({grad, weights}, "the gradient and the histogram");
  STD_TORCH_CHECK(grad.numel() == 3 * x.size(0) && grad.scalar_type() == x.scalar_type() &&
                      weights.numel() == x.size(0) * bins * bins &&
                      weights.scalar_type() == x.scalar_type(),
                  "mmfuse: the gradient must be [P, 3], the histogram [P, bins, bins], like x");
}

// Null where all samples count.
inline const bool* mask_of(const std::optional<Tensor>& present) {
  return present.has_value() ? static_cast<const bool*>(present->const_data_ptr()) : nullptr;
}

}  // namespace mmfuse
