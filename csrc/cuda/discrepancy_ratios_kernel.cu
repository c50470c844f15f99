#include "cuda/device/launch.h"
#include "discrepancy_ratios.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 32;

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    discrepancy_ratios_kernel(const DiscrepancyRatiosParams __grid_constant__ params) {
  const scalar_t* scores = static_cast<const scalar_t*>(params.scores);
  scalar_t* ratios = static_cast<scalar_t*>(params.ratios);
  for (int64_t m = threadIdx.x; m < params.modalities; m += kThreads) {
    scalar_t sum = 0;
    for (int64_t j = 0; j < params.modalities; ++j) {
      if (j != m) sum += scores[m] / scores[j];
    }
    ratios[m] = sum / static_cast<scalar_t>(params.modalities - 1);
  }
}

}  // namespace

void launch_discrepancy_ratios(const DiscrepancyRatiosParams& params, cudaStream_t stream) {
  const auto kernel =
      params.wide ? discrepancy_ratios_kernel<double> : discrepancy_ratios_kernel<float>;
  launch("discrepancy_ratios_kernel", kernel, 1, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
