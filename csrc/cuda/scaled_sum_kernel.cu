#include "cuda/device/launch.h"
#include "scaled_sum.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    scaled_sum_kernel(const ScaledSumParams __grid_constant__ params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.numel) return;
  const scalar_t scale = *static_cast<const scalar_t*>(params.factor);
  const scalar_t added = scale * static_cast<const scalar_t*>(params.b)[i];
  static_cast<scalar_t*>(params.out)[i] = static_cast<const scalar_t*>(params.a)[i] + added;
}

}  // namespace

void launch_scaled_sum(const ScaledSumParams& params, cudaStream_t stream) {
  if (params.numel == 0) return;
  const auto kernel = params.wide ? scaled_sum_kernel<double> : scaled_sum_kernel<float>;
  const auto blocks = static_cast<unsigned>((params.numel + kThreads - 1) / kThreads);
  launch("scaled_sum_kernel", kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
