#include "paired_cosine.h"

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/paired_cosine_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Rows for a task of about a chunk; not so many that the rounding of their sum would show.
int64_t rows_per_task(int64_t width) {
  return std::clamp<int64_t>(kChunk / std::max<int64_t>(1, width), 1, 4096);
}

// The cost of rows of a and b, and of an element of both besides.
Nanoseconds cost_of(DType dtype, int64_t rows, int64_t width, bool backward) {
  const double row = backward ? 20 : 12;
  const double element = (backward ? 0.25 : 0.08) * (dtype == DType::kFloat64 ? 2 : 1);
  return rows * ns(row + static_cast<double>(width) * element);
}

FeatureRows rows_of(const Tensor& a, const Tensor& b) {
  const DType dtype = dtype_of(a);
  STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && dtype_of(b) == dtype && a.dim() == 2 &&
                      b.dim() == 2 && b.size(0) == a.size(0) && b.size(1) == a.size(1),
                  "mmfuse: a and b must be [B, D], contiguous, of one dtype and shape");
  return {dtype, a.const_data_ptr(), b.const_data_ptr(), a.size(1), 0, a.size(0)};
}

}  // namespace

double mean_cosine(DType dtype, const std::vector<const void*>& features, int64_t rows,
                   int64_t width) {
  const size_t count = features.size();
  const int64_t pairs = static_cast<int64_t>(count * (count - 1) / 2);
  const auto kernel = MMFUSE_SIMD_SELECT(cosine_rows);
  // All pairs of a few rows, so that these come from memory once.
  const auto of_rows = [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (size_t m = 0; m < count; ++m) {
      for (size_t j = m + 1; j < count; ++j) {
        sum += kernel({dtype, features[m], features[j], width, begin, end});
      }
    }
    return sum;
  };
  const Nanoseconds cost = cost_of(dtype, pairs * rows, width, false);
  const double sum = sum_of_steps(rows, rows_per_task(width), cost, of_rows);
  // No row: 0 / 0 is the NaN that is wanted.
  return sum / static_cast<double>(pairs * rows);
}

Tensor paired_cosine(const Tensor& a, const Tensor& b) {
  const FeatureRows all = rows_of(a, b);
  return number_on_cpu(mean_cosine(all.dtype, {all.a, all.b}, all.end, all.width), all.dtype);
}

std::tuple<Tensor, Tensor> paired_cosine_backward(const Tensor& grad, const Tensor& a,
                                                  const Tensor& b) {
  const FeatureRows all = rows_of(a, b);
  Tensor grad_a = torch::stable::empty_like(a), grad_b = torch::stable::empty_like(b);
  const CosineGrads grads{grad_a.mutable_data_ptr(), grad_b.mutable_data_ptr(),
                          Coefficients(grad, 1, "grad")[0] / static_cast<double>(all.end)};
  const auto kernel = MMFUSE_SIMD_SELECT(cosine_grad_rows);
  const Nanoseconds cost = cost_of(all.dtype, all.end, all.width, true);
  parallel_steps(all.end, rows_per_task(all.width), cost, [&](int64_t, int64_t begin, int64_t end) {
    FeatureRows rows = all;
    rows.begin = begin;
    rows.end = end;
    kernel(rows, grads);
  });
  return {grad_a, grad_b};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("paired_cosine.cpu", TORCH_BOX(&mmfuse::cpu::paired_cosine));
  m.impl("paired_cosine_backward.cpu", TORCH_BOX(&mmfuse::cpu::paired_cosine_backward));
}
