#include "noisy_views.h"

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/noisy_views_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// The cost of an element: two deviates.
constexpr Nanoseconds kElement = ns(1.4);

}  // namespace

std::tuple<Tensor, Tensor, Tensor> noisy_views(const Tensor& x, double sigma,
                                               const Tensor& noise_state,
                                               const std::vector<int64_t>& noise_ids,
                                               const std::vector<int64_t>& noise_offsets) {
  STD_TORCH_CHECK(x.is_contiguous(), "mmfuse: x must be contiguous");
  STD_TORCH_CHECK(noise_ids.size() == 2 && noise_offsets.size() == 2,
                  "mmfuse: two views need two noise_ids and two noise_offsets");
  Tensor views[2] = {torch::stable::empty_like(x), torch::stable::empty_like(x)};
  const int64_t* state = noise_state_of(noise_state);
  const int64_t count = x.numel();
  ViewsSlice whole{};
  whole.dtype = dtype_of(x);
  whole.x = x.const_data_ptr();
  whole.sigma = sigma;
  for (int k = 0; k < 2; ++k) {
    whole.views[k] = views[k].mutable_data_ptr();
    whole.noise_keys[k] = noise_key(state, noise_ids[k]);
    whole.noise_offsets[k] = noise_offsets[k];
  }
  const auto kernel = MMFUSE_SIMD_SELECT(write_views);
  const double sum = sum_of_steps(count, kChunk, count * kElement, [&](int64_t begin, int64_t end) {
    ViewsSlice slice = whole;
    slice.begin = begin;
    slice.end = end;
    return kernel(slice);
  });
  // Nothing to compare: 0 / 0 is the NaN that is wanted.
  Tensor input_sq = number_on_cpu(sum / static_cast<double>(count), whole.dtype);
  return {views[0], views[1], input_sq};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("noisy_views.cpu", TORCH_BOX(&mmfuse::cpu::noisy_views));
}
