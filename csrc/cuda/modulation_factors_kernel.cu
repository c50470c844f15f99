#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "modulation_factors.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// The first threads decide about one modality each, the others about one tensor, for which they
// work out its owner's coefficient again: no thread waits for another.
__global__ void __launch_bounds__(kThreads, 1)
    modulation_factors_kernel(const ModulationFactorsParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = i - call.modalities;
  if (t >= call.tensors) return;
  const auto score = [&](int64_t j) { return load_coefficient<double>(call.scores, j); };
  const int64_t m = t < 0 ? i : call.owner[t];
  const double ratio = modulation_ratio(score, m, call.modalities, call.rule);
  const double coefficient = modulation_coefficient(ratio, call.rule);
  if (t < 0) {
    store_result(call.ratios, call.scores.wide, ratio, i);
    store_result(call.coefficients, call.scores.wide, coefficient, i);
    return;
  }
  // Rounded as the modality's own is.
  const double scale = call.scores.wide ? coefficient : static_cast<float>(coefficient);
  store_result(call.scale, call.wide_factors, scale, t);
  if (call.m2.values == nullptr) return;
  const double m2 = load_coefficient<double>(call.m2, t);
  const double noise_std = modulation_noise(call.numel[t], m2, call.eps);
  store_result(call.noise_std, call.wide_factors, noise_std, t);
}

}  // namespace

void launch_modulation_factors(const ModulationFactorsParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.modalities + params.tensors, kThreads);
  launch("modulation_factors_kernel", modulation_factors_kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
