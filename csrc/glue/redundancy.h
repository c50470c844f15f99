// The arguments and results of redundancy_pull, for both backends.
#pragma once

#include "tensors.h"

namespace mmfuse {

// Coefficients, growth, phase; history, steps, redundancy, average, weight; scale, pull.
using RedundancyResults =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// grad_stats of the tensors, or nothing.
struct C10_HIDDEN RedundancyMoments {
  const std::optional<Tensor>& numel;
  const std::optional<Tensor>& mean;
  const std::optional<Tensor>& m2;
  const std::optional<Tensor>& dot;
};

inline const double* doubles_of(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count &&
                      tensor.scalar_type() == ScalarType::Double,
                  "mmfuse: ", name, " must be float64, contiguous, with ", count, " elements");
  return static_cast<const double*>(tensor.const_data_ptr());
}

// True if there are statistics; either all of them or none.
inline bool check_redundancy(const Tensor& scores, const Tensor& history,
                             const RedundancyMoments& moments) {
  const int64_t modalities = scores.size(0);
  STD_TORCH_CHECK(scores.numel() == modalities || scores.numel() == modalities * modalities,
                  "mmfuse: scores must be [M] or [M, M]");
  STD_TORCH_CHECK(history.dim() == 2 && history.size(1) >= 2, "mmfuse: history must be [M, W + 1]");
  const bool given = moments.dot.has_value();
  STD_TORCH_CHECK(moments.numel.has_value() == given && moments.mean.has_value() == given &&
                      moments.m2.has_value() == given,
                  "mmfuse: statistics must be given together");
  return given;
}

}  // namespace mmfuse
