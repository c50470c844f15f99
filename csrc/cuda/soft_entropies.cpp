#include "soft_entropies.h"

#include "glue/cuda_tensors.h"
#include "glue/soft_pairs.h"

namespace mmfuse::cuda {

// Defined in soft_histogram.cpp; `present` is [P, N], null where all count.
Tensor masked_soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                             const Tensor& y_range, int64_t bins, const bool* present);

// Gradients of x, y and both ranges; 0 where a sample does not count.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_soft_histogram_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& x_range,
    const Tensor& y_range, int64_t bins, const bool* present);

namespace {

SoftPairs soft_pairs(const Tensor& x, const Tensor& y, const Tensor& x_range, const Tensor& y_range,
                     const bool* present) {
  return {
      {x.const_data_ptr(), y.const_data_ptr()},
      {const_cast<void*>(x_range.const_data_ptr()), const_cast<void*>(y_range.const_data_ptr())},
      present,
      x.size(0),
      x.size(1),
      x.scalar_type() == ScalarType::Double};
}

// The numbers of samples that count, in each problem of a call.
struct C10_HIDDEN Counts {
  std::optional<Tensor> numbers;

  Counts(const Tensor& x, const SoftPairs& pairs, cudaStream_t stream) {
    if (pairs.present == nullptr) return;
    numbers = torch::stable::new_zeros(x, {x.size(0)}, ScalarType::Long);
    launch_soft_counts(pairs, data(), stream);
  }

  unsigned long long* data() {
    return numbers ? static_cast<unsigned long long*>(numbers->mutable_data_ptr()) : nullptr;
  }
};

SoftTables soft_tables(const Tensor& x, const Tensor& weights, Counts& counts) {
  return {weights.const_data_ptr(),
          counts.data(),
          x.size(0),
          x.size(1),
          static_cast<int>(weights.size(1)),
          x.scalar_type() == ScalarType::Double};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_entropies(const Tensor& x, const Tensor& y,
                                                          int64_t bins,
                                                          const std::optional<Tensor>& present) {
  check_soft_pairs(x, y, bins, present);
  const bool* mask = mask_of(present);
  const DeviceScope device(x);
  const int64_t problems = x.size(0);
  const Tensor x_range = new_empty(x, {problems, 2}, x.scalar_type());
  const Tensor y_range = new_empty(x, {problems, 2}, x.scalar_type());
  Tensor partials =
      new_empty(x, {2, problems, chunk_count(x.size(1), kEndsChunk), 2}, x.scalar_type());
  const SoftPairs pairs = soft_pairs(x, y, x_range, y_range, mask);
  launch_soft_ranges({pairs, partials.mutable_data_ptr()}, device.stream());
  Counts counts(x, pairs, device.stream());
  const Tensor weights = masked_soft_histogram(x, y, x_range, y_range, bins, mask);
  Tensor entropies = new_empty(x, {problems, 3}, x.scalar_type());
  launch_soft_entropies(soft_tables(x, weights, counts), entropies.mutable_data_ptr(),
                        device.stream());
  return {entropies, weights, x_range, y_range};
}

std::tuple<Tensor, Tensor> soft_entropies_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& y, const Tensor& weights,
                                                   const Tensor& x_range, const Tensor& y_range,
                                                   const std::optional<Tensor>& present) {
  const int64_t bins = weights.dim() == 3 ? weights.size(1) : 0;
  check_soft_pairs(x, y, bins, present);
  check_soft_gradient(grad, x, weights, bins);
  const bool* mask = mask_of(present);
  const DeviceScope device(x);
  SoftEndsParams ends{};
  ends.pairs = soft_pairs(x, y, x_range, y_range, mask);
  Counts samples(x, ends.pairs, device.stream());
  Tensor slopes = torch::stable::empty_like(weights);
  launch_soft_slopes(soft_tables(x, weights, samples), grad.const_data_ptr(),
                     slopes.mutable_data_ptr(), device.stream());
  auto [grad_x, grad_y, grad_x_range, grad_y_range] =
      masked_soft_histogram_backward(slopes, x, y, x_range, y_range, bins, mask);
  Tensor counts = torch::stable::new_zeros(x, {2, x.size(0), 2}, ScalarType::Long);
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
