#include <algorithm>

#include "element.h"
#include "launch.h"
#include "modulation_factors.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ void store_number(const Numbers& out, int64_t i, double value) {
  if (out.wide) {
    static_cast<double*>(out.values)[i] = value;
  } else {
    static_cast<float*>(out.values)[i] = static_cast<float>(value);
  }
}

// Thread i decides about modality i, and about tensor i, for which it works out its owner's
// coefficient again: no thread waits for another.
__global__ void __launch_bounds__(kThreads)
    modulation_factors_kernel(const ModulationFactorsParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto score = [&](int64_t j) { return load_coefficient<double>(call.scores, j); };
  if (i < call.modalities) {
    const double ratio = discrepancy_ratio(score, i, call.modalities);
    store_number(call.found, i, ratio);
    store_number(call.found, call.modalities + i, modulation_coefficient(ratio, call.rule));
  }
  if (i >= call.tensors) return;
  const double ratio = discrepancy_ratio(score, call.owner[i], call.modalities);
  const double coefficient = modulation_coefficient(ratio, call.rule);
  // Rounded as the modality's own coefficient is.
  store_number(call.factors, i, call.found.wide ? coefficient : static_cast<float>(coefficient));
  if (call.m2.values == nullptr) return;
  const double m2 = load_coefficient<double>(call.m2, i);
  store_number(call.factors, call.tensors + i, modulation_noise(call.numel[i], m2, call.eps));
}

}  // namespace

void launch_modulation_factors(const ModulationFactorsParams& params, cudaStream_t stream) {
  const int64_t work = std::max(params.modalities, params.tensors);
  launch("modulation_factors_kernel", modulation_factors_kernel, chunk_count(work, kThreads),
         kThreads, stream, params);
}

}  // namespace mmfuse::cuda
