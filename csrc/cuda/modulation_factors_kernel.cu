#include "cuda/device/launch.h"
#include "cuda/device/modulate.h"
#include "modulation_factors.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// The first threads decide about one modality each, the others about one tensor.
__global__ void __launch_bounds__(kThreads, 1)
    modulation_factors_kernel(const ModulationFactorsParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = i - call.modalities;
  if (t >= call.tensors) return;
  if (i == 0) start_update(call);
  if (t < 0) return decide_modality(call, i);
  decide_tensor(call, t);
  if (call.m2.values == nullptr) return;
  decide_noise(call, t, call.numel[t], load_coefficient<double>(call.m2, t));
}

}  // namespace

void launch_modulation_factors(const ModulationFactorsParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.modalities + params.tensors, kThreads);
  launch("modulation_factors_kernel", modulation_factors_kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
