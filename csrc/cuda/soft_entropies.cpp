#include "soft_entropies.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

// In soft_histogram.cpp.
Tensor soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                      const Tensor& y_range, int64_t bins);
std::tuple<Tensor, Tensor, Tensor, Tensor> soft_histogram_backward(const Tensor& grad,
                                                                   const Tensor& x, const Tensor& y,
                                                                   const Tensor& x_range,
                                                                   const Tensor& y_range,
                                                                   int64_t bins);

namespace {

void check_values(const Tensor& x, const Tensor& y, int64_t bins) {
  check_contiguous({x, y}, "values");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) &&
                      x.size(1) == y.size(1) && x.size(1) > 0 &&
                      x.scalar_type() == y.scalar_type() && x.scalar_type() == result_type({x}),
                  "mmfuse: x and y must be [P, N], of one shape, both float32 or both float64");
  STD_TORCH_CHECK(bins >= 2 && bins <= 256, "mmfuse: bins must be from 2 to 256");
}

SoftPairs soft_pairs(const Tensor& x, const Tensor& y, const Tensor& x_range,
                     const Tensor& y_range) {
  return {
      {x.const_data_ptr(), y.const_data_ptr()},
      {const_cast<void*>(x_range.const_data_ptr()), const_cast<void*>(y_range.const_data_ptr())},
      x.size(0),
      x.size(1),
      x.scalar_type() == ScalarType::Double};
}

SoftTables soft_tables(const Tensor& x, const Tensor& weights) {
  return {weights.const_data_ptr(), x.size(0), x.size(1), static_cast<int>(weights.size(1)),
          x.scalar_type() == ScalarType::Double};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_entropies(const Tensor& x, const Tensor& y,
                                                          int64_t bins) {
  check_values(x, y, bins);
  const DeviceScope device(x);
  const int64_t problems = x.size(0);
  const Tensor x_range = new_empty(x, {problems, 2}, x.scalar_type());
  const Tensor y_range = new_empty(x, {problems, 2}, x.scalar_type());
  Tensor partials =
      new_empty(x, {2, problems, chunk_count(x.size(1), kEndsChunk), 2}, x.scalar_type());
  launch_soft_ranges({soft_pairs(x, y, x_range, y_range), partials.mutable_data_ptr()},
                     device.stream());
  const Tensor weights = soft_histogram(x, y, x_range, y_range, bins);
  Tensor entropies = new_empty(x, {problems, 3}, x.scalar_type());
  launch_soft_entropies(soft_tables(x, weights), entropies.mutable_data_ptr(), device.stream());
  return {entropies, weights, x_range, y_range};
}

std::tuple<Tensor, Tensor> soft_entropies_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& y, const Tensor& weights,
                                                   const Tensor& x_range, const Tensor& y_range) {
  const int64_t bins = weights.dim() == 3 ? weights.size(1) : 0;
  check_values(x, y, bins);
  check_contiguous({grad, weights}, "the gradient and the histogram");
  STD_TORCH_CHECK(grad.numel() == 3 * x.size(0) && grad.scalar_type() == x.scalar_type() &&
                      weights.numel() == x.size(0) * bins * bins &&
                      weights.scalar_type() == x.scalar_type(),
                  "mmfuse: the gradient must be [P, 3], the histogram [P, bins, bins], like x");
  const DeviceScope device(x);
  Tensor slopes = torch::stable::empty_like(weights);
  launch_soft_slopes(soft_tables(x, weights), grad.const_data_ptr(), slopes.mutable_data_ptr(),
                     device.stream());
  auto [grad_x, grad_y, grad_x_range, grad_y_range] =
      soft_histogram_backward(slopes, x, y, x_range, y_range, bins);
  Tensor counts = torch::stable::new_zeros(x, {2, x.size(0), 2}, ScalarType::Long);
  SoftEndsParams ends{};
  ends.pairs = soft_pairs(x, y, x_range, y_range);
  ends.of_ranges[0] = grad_x_range.const_data_ptr();
  ends.of_ranges[1] = grad_y_range.const_data_ptr();
  ends.grads[0] = grad_x.mutable_data_ptr();
  ends.grads[1] = grad_y.mutable_data_ptr();
  ends.counts = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  launch_soft_ends(ends, device.stream());
  return {grad_x, grad_y};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("soft_entropies.cuda", TORCH_BOX(&mmfuse::cuda::soft_entropies));
  m.impl("soft_entropies_backward.cuda", TORCH_BOX(&mmfuse::cuda::soft_entropies_backward));
}
