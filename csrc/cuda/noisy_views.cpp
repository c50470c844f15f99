#include "noisy_views.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {

std::tuple<Tensor, Tensor, Tensor> noisy_views(const Tensor& x, double sigma,
                                               const Tensor& noise_state,
                                               const std::vector<int64_t>& noise_ids,
                                               const std::vector<int64_t>& noise_offsets) {
  STD_TORCH_CHECK(x.is_contiguous(), "mmfuse: x must be contiguous");
  STD_TORCH_CHECK(noise_ids.size() == 2 && noise_offsets.size() == 2,
                  "mmfuse: noisy_views needs one noise id and one noise offset per view");
  const DeviceScope device(x);
  Tensor views[2] = {torch::stable::empty_like(x), torch::stable::empty_like(x)};
  Tensor input_sq = new_empty(x, {}, result_type({x}));
  Tensor partials = new_empty(x, {chunk_count(x.numel(), kViewsChunk)}, ScalarType::Double);
  NoisyViewsParams call{};
  call.x = x.const_data_ptr();
  for (int k = 0; k < 2; ++k) {
    call.views[k] = {views[k].mutable_data_ptr(), noise_offsets[k],
                     static_cast<uint32_t>(noise_ids[k])};
  }
  call.numel = x.numel();
  call.dtype = dtype_of(x);
  call.sigma = sigma;
  call.noise_state = noise_state_of(noise_state);
  call.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.input_sq = input_sq.mutable_data_ptr();
  launch_noisy_views(call, device.stream());
  return {views[0], views[1], input_sq};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("noisy_views.cuda", TORCH_BOX(&mmfuse::cuda::noisy_views));
}
