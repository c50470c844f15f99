// Reads small float32 or float64 tensors of coefficients, one for each gradient.
#pragma once

#include "glue.h"

namespace mmfuse::cpu {

class Coefficients {
 public:
  Coefficients(const Tensor& tensor, size_t count, const char* name)
      : data_(tensor.const_data_ptr()), dtype_(dtype_of(tensor)) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == static_cast<int64_t>(count) &&
                        (dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64),
                    "mmfuse: ", name, " must be float32 or float64, contiguous, with ", count,
                    " elements");
  }

  double operator[](size_t i) const {
    return dtype_ == DType::kFloat64 ? static_cast<const double*>(data_)[i]
                                     : static_cast<const float*>(data_)[i];
  }

 private:
  const void* data_;
  DType dtype_;
};

// A NoiseStream's (seed, step).
inline const int64_t* noise_state_of(const Tensor& state) {
  STD_TORCH_CHECK(
      state.is_contiguous() && state.numel() == 2 && state.scalar_type() == ScalarType::Long,
      "mmfuse: noise_state must be int64 with 2 elements");
  return static_cast<const int64_t*>(state.const_data_ptr());
}

}  // namespace mmfuse::cpu
