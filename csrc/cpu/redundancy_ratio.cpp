#include "redundancy_ratio.h"

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/redundancy_ratio_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

constexpr double kEps = 1e-12;
// The cost of an element.
constexpr Nanoseconds kNarrow = ns(0.07), kWide = ns(0.2);

}  // namespace

Tensor redundancy_ratio(const Tensor& z1, const Tensor& z2, const Tensor& input_sq) {
  const DType dtype = dtype_of(z1);
  const int64_t count = z1.numel();
  STD_TORCH_CHECK(
      z1.is_contiguous() && z2.is_contiguous() && dtype_of(z2) == dtype && z2.numel() == count,
      "mmfuse: z1 and z2 must be contiguous, of one dtype and size");
  const double input = Coefficients(input_sq, 1, "input_sq")[0];
  const RepresentationSlice whole{dtype, z1.const_data_ptr(), z2.const_data_ptr(), 0, count};
  const auto kernel = MMFUSE_SIMD_SELECT(representation_distance);
  const Nanoseconds cost = count * (dtype == DType::kFloat64 ? kWide : kNarrow);
  const double sum = sum_of_steps(count, kChunk, cost, [&](int64_t begin, int64_t end) {
    RepresentationSlice slice = whole;
    slice.begin = begin;
    slice.end = end;
    return kernel(slice);
  });
  // Nothing to compare: 0 / 0 is the NaN that is wanted.
  return number_on_cpu(sum / static_cast<double>(count) / (input + kEps), dtype);
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("redundancy_ratio.cpu", TORCH_BOX(&mmfuse::cpu::redundancy_ratio));
}
