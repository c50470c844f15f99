// What every op's glue needs from PyTorch's stable ABI; kernels themselves see no torch header.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace mmfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "mmfuse: expected a float16, bfloat16, float32 or float64 tensor");
  }
}

// Results are float64 as soon as one input is, float32 otherwise.
inline ScalarType result_type(const TensorList& tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

inline void check_contiguous(const TensorList& tensors, const char* what) {
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "mmfuse: ", what, " must be contiguous");
  }
}

// The lists' lengths: no parameters, or one for each gradient, and as many anchors or none.
inline void check_pairs(const TensorList& grads, const TensorList& params,
                        const TensorList& anchors) {
  STD_TORCH_CHECK(params.empty() || params.size() == grads.size(),
                  "mmfuse: params must be empty or match grads");
  STD_TORCH_CHECK(anchors.empty() || anchors.size() == params.size(),
                  "mmfuse: anchors must be empty or match params");
}

// int64 numbers, one for each of `count` tensors.
inline const int64_t* indices_of(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_contiguous() && tensor.numel() == count && tensor.scalar_type() == ScalarType::Long,
      "mmfuse: ", name, " must be int64, contiguous, with ", count, " elements");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

inline Tensor empty_on_cpu(const std::vector<int64_t>& size, ScalarType dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::empty(size, dtype, std::nullopt, cpu);
}

}  // namespace mmfuse
