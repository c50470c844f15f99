#include "paired_cosine.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

void check_rows(const Tensor& a, const Tensor& b) {
  check_contiguous({a, b}, "features");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) &&
                      a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "mmfuse: features must be [B, D], of one shape and one dtype");
}

}  // namespace

Tensor paired_cosine(const Tensor& a, const Tensor& b) {
  check_rows(a, b);
  const DeviceScope device(a);
  Tensor cosine = new_empty(a, {}, result_type({a}));
  PairedCosineParams call;
  call.sums.pairs = {{a.const_data_ptr(), b.const_data_ptr()}};
  call.sums.rows = a.size(0);
  call.sums.columns = a.size(1);
  call.sums.dtype = dtype_of(a);
  Tensor partials = new_empty(a, {cosine_blocks(a.size(0), a.size(1))}, ScalarType::Double);
  call.sums.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.cosine = cosine.mutable_data_ptr();
  launch_paired_cosine(call, device.stream());
  return cosine;
}

std::tuple<Tensor, Tensor> paired_cosine_backward(const Tensor& grad, const Tensor& a,
                                                  const Tensor& b) {
  check_rows(a, b);
  const DeviceScope device(a);
  Tensor grad_a = torch::stable::empty_like(a);
  Tensor grad_b = torch::stable::empty_like(b);
  PairedCosineBackwardParams call{};
  call.pair = {a.const_data_ptr(), b.const_data_ptr()};
  call.grad_a = grad_a.mutable_data_ptr();
  call.grad_b = grad_b.mutable_data_ptr();
  call.rows = a.size(0);
  call.columns = a.size(1);
  call.dtype = dtype_of(a);
  call.grad = coefficients_of(grad, 1, "the gradient");
  launch_paired_cosine_backward(call, device.stream());
  return {grad_a, grad_b};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("paired_cosine.cuda", TORCH_BOX(&mmfuse::cuda::paired_cosine));
  m.impl("paired_cosine_backward.cuda", TORCH_BOX(&mmfuse::cuda::paired_cosine_backward));
}
