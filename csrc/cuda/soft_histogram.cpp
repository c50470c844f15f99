#include "soft_histogram.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

SoftRows soft_rows(const Tensor& x, const Tensor& y, const Tensor& x_range, const Tensor& y_range,
                   int64_t bins, const bool* present) {
  check_contiguous({x, y, x_range, y_range}, "values and ranges");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) &&
                      x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type(),
                  "mmfuse: x and y must be [P, N], of one shape and one dtype");
  for (const Tensor& range : {x_range, y_range}) {
    STD_TORCH_CHECK(range.numel() == 2 * x.size(0) && range.scalar_type() == result_type({x}),
                    "mmfuse: ranges must be [P, 2], float64 for float64, otherwise float32");
  }
  STD_TORCH_CHECK(bins >= 2 && bins <= 256, "mmfuse: bins must be from 2 to 256");
  STD_TORCH_CHECK(present == nullptr || x.scalar_type() == result_type({x}),
                  "mmfuse: with a mask the values must be float32 or float64");
  return {x.const_data_ptr(),
          y.const_data_ptr(),
          x_range.const_data_ptr(),
          y_range.const_data_ptr(),
          present,
          x.size(0),
          x.size(1),
          static_cast<int>(bins),
          dtype_of(x)};
}

int64_t soft_parts(const SoftRows& rows) { return chunk_count(rows.columns, soft_chunk(rows)); }

}  // namespace

Tensor masked_soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                             const Tensor& y_range, int64_t bins, const bool* present) {
  SoftHistogramParams call{};
  call.rows = soft_rows(x, y, x_range, y_range, bins, present);
  const DeviceScope device(x);
  Tensor weights = new_empty(x, {call.rows.problems, bins, bins}, result_type({x}));
  call.weights = weights.mutable_data_ptr();
  std::optional<Tensor> sums;
  if (!block_per_problem(call.rows)) {
    const int64_t words = soft_sum_words(call.rows.dtype) * bins * bins + 1;
    sums = new_empty(x, {call.rows.problems, words}, ScalarType::Long);
    torch::stable::zero_(*sums);
    call.sums = sums->mutable_data_ptr();
  }
  launch_soft_histogram(call, device.stream());
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_soft_histogram_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& x_range,
    const Tensor& y_range, int64_t bins, const bool* present) {
  SoftHistogramBackwardParams call{};
  call.rows = soft_rows(x, y, x_range, y_range, bins, present);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == x.size(0) * bins * bins &&
                      grad.scalar_type() == result_type({x}),
                  "mmfuse: the gradient must be contiguous, [P, bins, bins], like the histogram");
  const DeviceScope device(x);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_y = torch::stable::empty_like(y);
  Tensor grad_x_range = torch::stable::empty_like(x_range);
  Tensor grad_y_range = torch::stable::empty_like(y_range);
  Tensor partials =
      new_empty(x, {call.rows.problems, soft_parts(call.rows), 4}, ScalarType::Double);
  call.grad = grad.const_data_ptr();
  call.grad_x = grad_x.mutable_data_ptr();
  call.grad_y = grad_y.mutable_data_ptr();
  call.grad_x_range = grad_x_range.mutable_data_ptr();
  call.grad_y_range = grad_y_range.mutable_data_ptr();
  call.partials = static_cast<double*>(partials.mutable_data_ptr());
  launch_soft_histogram_backward(call, device.stream());
  return {grad_x, grad_y, grad_x_range, grad_y_range};
}

Tensor soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                      const Tensor& y_range, int64_t bins) {
  return masked_soft_histogram(x, y, x_range, y_range, bins, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_histogram_backward(const Tensor& grad,
                                                                   const Tensor& x, const Tensor& y,
                                                                   const Tensor& x_range,
                                                                   const Tensor& y_range,
                                                                   int64_t bins) {
  return masked_soft_histogram_backward(grad, x, y, x_range, y_range, bins, nullptr);
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("soft_histogram.cuda", TORCH_BOX(&mmfuse::cuda::soft_histogram));
  m.impl("soft_histogram_backward.cuda", TORCH_BOX(&mmfuse::cuda::soft_histogram_backward));
}
