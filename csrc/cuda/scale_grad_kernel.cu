#include "cuda/device/launch.h"
#include "cuda/device/update_tensor.h"
#include "scale_grad.h"

namespace mmfuse::cuda {
namespace {

constexpr int kBlocksPerSm = 4;

template <typename scalar_t, bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    scale_grad_backward_kernel(const ScaleGradParams __grid_constant__ params) {
  using acc_t = acc_type<scalar_t>;
  TensorUpdate<scalar_t> tensor{};
  tensor.in = static_cast<const scalar_t*>(params.grad);
  tensor.out = static_cast<scalar_t*>(params.out);
  tensor.numel = params.numel;
  tensor.store = true;
  tensor.scale = load_coefficient<acc_t>(params.coefficient, 0);
  if constexpr (kNoise) {
    tensor.noise_std = load_coefficient<acc_t>(params.noise_std, 0);
    tensor.key = load_noise_key(params.noise_state, params.noise_id);
    tensor.noise_offset = params.noise_offset;
  }
  const int64_t chunks = chunk_count(params.numel, kUpdateChunk);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    update_chunk<Anchors::kNone, kNoise>(tensor, chunk);
  }
}

}  // namespace

void launch_scale_grad_backward(const ScaleGradParams& params, cudaStream_t stream) {
  if (params.numel == 0) return;
  const int64_t chunks = chunk_count(params.numel, kUpdateChunk);
  visit_dtype(params.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    const auto kernel = params.noise_std.values != nullptr
                            ? scale_grad_backward_kernel<scalar_t, true>
                            : scale_grad_backward_kernel<scalar_t, false>;
    launch("scale_grad_backward_kernel", kernel, resident_blocks(chunks, kBlocksPerSm), kThreads,
           stream, params);
  });
}

}  // namespace mmfuse::cuda
