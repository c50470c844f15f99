// The decision of modulation_factors about one modality and about one tensor, for its own kernel
// and for grad_stats, which takes it where it merges a tensor's sums.
#pragma once

#include "cuda/modulation_factors.h"
#include "element.h"

namespace mmfuse::cuda {

__device__ __forceinline__ double ratio_of(const ModulationFactorsParams& call, int64_t m) {
  const auto score = [&](int64_t j) { return load_coefficient<double>(call.scores, j); };
  return modulation_ratio(score, m, call.modalities, call.rule);
}

__device__ __forceinline__ void decide_modality(const ModulationFactorsParams& call, int64_t m) {
  const double ratio = ratio_of(call, m);
  store_result(call.ratios, call.scores.wide, ratio, m);
  store_result(call.coefficients, call.scores.wide, modulation_coefficient(ratio, call.rule), m);
}

// Works out its owner's coefficient again: no thread waits for another.
__device__ __forceinline__ void decide_tensor(const ModulationFactorsParams& call, int64_t t) {
  const double coefficient = modulation_coefficient(ratio_of(call, call.owner[t]), call.rule);
  // Rounded as the modality's own is.
  const double scale = call.scores.wide ? coefficient : static_cast<float>(coefficient);
  store_result(call.scale, call.wide_factors, scale, t);
}

__device__ __forceinline__ void decide_noise(const ModulationFactorsParams& call, int64_t t,
                                             int64_t numel, double m2) {
  store_result(call.noise_std, call.wide_factors, modulation_noise(numel, m2, call.eps), t);
}

// The beginning of the update that follows.
__device__ __forceinline__ void start_update(const ModulationFactorsParams& call) {
  if (call.finite != nullptr) *call.finite = true;
  if (call.done != nullptr) *call.done = 0;
}

}  // namespace mmfuse::cuda
