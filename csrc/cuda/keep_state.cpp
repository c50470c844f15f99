#include "keep_state.h"

#include "glue/cuda_tensors.h"
#include "glue/kept.h"

namespace mmfuse::cuda {

void keep_state_(const TensorList& state, const TensorList& values, const Tensor& finite,
                 const std::optional<Tensor>& sums) {
  check_kept(state, values, finite);
  KeepStateParams call{};
  for (size_t i = 0; i < state.size(); ++i) {
    call.tensors.push_back({static_cast<uint8_t*>(state[i].mutable_data_ptr()),
                            static_cast<const uint8_t*>(values[i].const_data_ptr()),
                            static_cast<int64_t>(bytes_of(state[i]))});
  }
  call.finite = flags_of(finite, 1, "finite");
  if (sums) {
    call.count = sums->numel();
    call.sums = coefficients_of(*sums, static_cast<size_t>(call.count), "sums");
  }
  const DeviceScope device(finite);
  launch_keep_state(call, device.stream());
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("keep_state_.cuda", TORCH_BOX(&mmfuse::cuda::keep_state_));
}
