// Rows of logits and of targets that modality_scores reads where they lie.
#pragma once

#include "tensors.h"

namespace mmfuse {

// [N, C] or [N, C, D] as [outer, classes, inner]; what adjoins is one by one in memory.
struct RowLayout {
  int64_t outer;
  int64_t classes;
  int64_t inner;
  int64_t outer_stride;
  int64_t class_stride;
  int64_t inner_stride;
  bool classes_adjoin;  // else the rows of one outer do
};

inline RowLayout row_layout(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 3, "mmfuse: expected [N, C] or [N, C, D]");
  RowLayout layout;
  layout.classes = tensor.size(1);
  layout.class_stride = tensor.stride(1);
  if (tensor.dim() == 2 || tensor.size(2) == 1) {
    layout.outer = 1;
    layout.outer_stride = 0;
    layout.inner = tensor.size(0);
    layout.inner_stride = tensor.stride(0);
  } else {
    layout.outer = tensor.size(0);
    layout.outer_stride = tensor.stride(0);
    layout.inner = tensor.size(2);
    layout.inner_stride = tensor.stride(2);
  }
  layout.classes_adjoin = layout.class_stride == 1 && layout.classes > 1;
  return layout;
}

inline std::vector<int64_t> shape_of_rows(const Tensor& labels) {
  std::vector<int64_t> shape;
  const bool indices = labels.scalar_type() == ScalarType::Long;
  for (int64_t d = 0; d < labels.dim(); ++d) {
    if (indices || d != 1) shape.push_back(labels.size(d));
  }
  return shape;
}

// The modality in whose precision the rows' weights are returned.
inline size_t widest(const TensorList& logits) {
  for (size_t m = 0; m < logits.size(); ++m) {
    if (logits[m].scalar_type() == ScalarType::Double) return m;
  }
  return 0;
}

inline void check_weights(const std::optional<Tensor>& weight, int64_t classes, const char* name) {
  STD_TORCH_CHECK(!weight.has_value() ||
                      (weight->is_contiguous() && weight->scalar_type() == ScalarType::Double &&
                       weight->numel() == classes),
                  "mmfuse: ", name, " must be float64, contiguous, one number for each class");
}

// The rows of all logits, with what the kernels rely on.
inline std::vector<RowLayout> checked_layouts(const TensorList& logits, const Tensor& labels,
                                              const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& pos_weight,
                                              bool multilabel) {
  const bool indices = labels.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(!(indices && multilabel) && (!indices || labels.is_contiguous()),
                  "mmfuse: labels must be contiguous int64, or floating");
  const int64_t numbers = labels.numel();
  std::vector<RowLayout> layouts;
  layouts.reserve(logits.size());
  for (const Tensor& tensor : logits) {
    const RowLayout& layout = layouts.emplace_back(row_layout(tensor));
    STD_TORCH_CHECK(layout.classes_adjoin || layout.inner_stride == 1 || layout.inner <= 1,
                    "mmfuse: neither classes nor rows of the logits adjoin in memory");
    const int64_t rows = layout.outer * layout.inner;
    STD_TORCH_CHECK(numbers == (indices ? rows : rows * layout.classes) &&
                        (indices || labels.dim() == tensor.dim()),
                    "mmfuse: logits must be [N, C] or [N, C, D], with labels for each row");
    check_weights(weight, layout.classes, "weight");
    check_weights(pos_weight, layout.classes, "pos_weight");
  }
  return layouts;
}

}  // namespace mmfuse
