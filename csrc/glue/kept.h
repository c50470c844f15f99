// Tensors of a method's state: flags, and whatever keep_state_ moves as bytes.
#pragma once

#include "tensors.h"

namespace mmfuse {

inline size_t bytes_of(const Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.element_size();
}

inline const bool* flags_of(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_contiguous() && tensor.numel() == count && tensor.scalar_type() == ScalarType::Bool,
      "mmfuse: ", name, " must be bool, contiguous, with ", count, " elements");
  return static_cast<const bool*>(tensor.const_data_ptr());
}

inline void check_kept(const TensorList& state, const TensorList& values, const Tensor& finite) {
  STD_TORCH_CHECK(state.size() == values.size(), "mmfuse: state and values must match");
  for (size_t i = 0; i < state.size(); ++i) {
    STD_TORCH_CHECK(state[i].is_contiguous() && values[i].is_contiguous() &&
                        state[i].scalar_type() == values[i].scalar_type() &&
                        state[i].numel() == values[i].numel(),
                    "mmfuse: state and values must be contiguous, of one dtype and size");
  }
  flags_of(finite, 1, "finite");
}

}  // namespace mmfuse
