// Needed by every op's glue from PyTorch's stable ABI; kernels themselves see no torch header.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "poison.h"

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

// How the elements of one index of the first dimension lie in memory: as [spatial, channels] where
// the tensor is in channels_last, in the order of their index where both are 1.
struct RowOrder {
  int64_t channels = 1;
  int64_t spatial = 1;

  bool transposed() const { return channels > 1; }
  bool operator==(const RowOrder& other) const {
    return channels == other.channels && spatial == other.spatial;
  }
};

// mmfuse/ops/_tensors.py has it, too: places in a row fit the arithmetic of all backends.
constexpr int64_t kLongestRow = int64_t{1} << 20;

inline RowOrder row_order(const Tensor& tensor, const char* what) {
  if (tensor.is_contiguous()) return {};
  const int64_t dims = tensor.dim();
  bool last = dims == 4 || dims == 5;
  int64_t expected = 1;
  // The order begins with the dimension that lies closest: channels, spatial ones backwards, rows.
  for (int64_t i = 0; last && i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    last = tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
  }
  STD_TORCH_CHECK(last, "mmfuse: ", what, " must be contiguous, or in channels_last");
  const int64_t row = tensor.numel() / tensor.size(0);
  STD_TORCH_CHECK(row <= kLongestRow, "mmfuse: ", what, " in channels_last have too long rows");
  return {tensor.size(1), row / tensor.size(1)};
}

// Each gradient's order; parameters and anchors, where there are any, lie as their gradients do.
inline std::vector<RowOrder> row_orders(const TensorList& grads, const TensorList& params,
                                        const TensorList& anchors) {
  std::vector<RowOrder> orders(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    orders[t] = row_order(grads[t], "gradients");
    const bool alike = (params.empty() || row_order(params[t], "parameters") == orders[t]) &&
                       (anchors.empty() || row_order(anchors[t], "anchors") == orders[t]);
    STD_TORCH_CHECK(alike, "mmfuse: params and anchors must lie in memory as their gradients do");
  }
  return orders;
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

// A new result, without the dispatcher, which takes as long as a small kernel.
inline Tensor empty_on_cpu(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  constexpr size_t kMostDimensions = 64;  // PyTorch's
  STD_TORCH_CHECK(size.size() <= kMostDimensions, "mmfuse: a result has too many dimensions");
  int64_t strides[kMostDimensions];
  int64_t count = 1;
  for (size_t d = size.size(); d-- > 0;) {
    strides[d] = count;
    count *= size[d] > 0 ? size[d] : 1;
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(),
                                                  strides, code, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  Tensor made(handle);
  if (poisons && made.numel() > 0) {
    const int byte = dtype == ScalarType::Bool ? 1 : 0xff;  // NaN, and -1
    std::memset(made.mutable_data_ptr(), byte, made.numel() * made.element_size());
  }
  return made;
}

}  // namespace mmfuse
