#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "progress_factors.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// The first threads decide about one modality each, the others about one tensor, for which they
// work out its owner's share again: no thread waits for another.
__global__ void __launch_bounds__(kThreads, 1)
    progress_factors_kernel(const ProgressFactorsParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = i - call.modalities;
  if (t >= call.tensors) return;
  const auto score = [&](int64_t k) { return load_coefficient<double>(call.scores, k); };
  const auto last = [&](int64_t k) { return load_coefficient<double>(call.last_scores, k); };
  const Progress<decltype(score), decltype(last)> progress{score, last, call.modalities,
                                                           call.table};
  const bool wide = call.last_scores.wide;
  const int64_t m = t < 0 ? i : call.owner[t];
  const double share = progress_share(progress, m, call.rule.bound);
  const double coefficient = progress_coefficient(share, call.rule);
  if (t >= 0) {
    // Rounded as the modality's own is.
    store_result(call.scale, call.wide_scale, wide ? coefficient : static_cast<float>(coefficient),
                 t);
    return;
  }
  store_result(call.coefficients, wide, coefficient, m);
  store_result(call.progress, wide, progress.change(m, m), m);
  store_result(call.shares, wide, share, m);
  const double kept = share == share ? share : load_coefficient<double>(call.last_shares, m);
  store_result(call.kept_shares, wide, kept, m);
  for (int64_t j = 0; j < call.modalities; ++j) {
    store_result(call.kept_scores, wide, progress.kept(m, j), m * call.modalities + j);
  }
}

}  // namespace

void launch_progress_factors(const ProgressFactorsParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.modalities + params.tensors, kThreads);
  launch("progress_factors_kernel", progress_factors_kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
