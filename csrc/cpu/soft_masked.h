// Soft histograms of some of the samples; `present` is [P, N], null where all count.
#pragma once

#include "glue/tensors.h"

namespace mmfuse::cpu {

Tensor masked_soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                             const Tensor& y_range, int64_t bins, const bool* present);

// Gradients of x, y and both ranges; 0 where a sample does not count.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_soft_histogram_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& x_range,
    const Tensor& y_range, int64_t bins, const bool* present);

}  // namespace mmfuse::cpu
