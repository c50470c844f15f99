#include "common/information.h"
#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "information_pull.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// The first threads decide about one modality each, the others about one tensor, for which they
// work out its owner's strength again: no thread waits for another.
__global__ void __launch_bounds__(kThreads, 1)
    information_pull_kernel(const InformationPullParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = i - call.modalities;
  if (t >= call.tensors) return;
  const auto score = [&](int64_t k) {
    const double number = load_coefficient<double>(call.scores, k);
    if (call.counts.values == nullptr) return number;
    return rounded_product(number, load_coefficient<double>(call.counts, call.one_count ? 0 : k));
  };
  const Compared<decltype(score)> compared{score, call.modalities, call.table};
  const int64_t m = t < 0 ? i : call.owner[t];
  const double gap = information_gap(compared, m);
  const double multiplier =
      call.multipliers.values == nullptr ? 1.0 : load_coefficient<double>(call.multipliers, m);
  const double alpha = information_strength(gap, call.open[m], call.beta, multiplier);
  if (t >= 0) {
    store_result(call.scale, call.scores.wide, 1.0, t);
    store_result(call.pull, call.scores.wide, alpha, t);
    return;
  }
  store_result(call.coefficients, call.scores.wide, alpha, m);
  call.gap[m] = gap;
  // Without its count, which may be NaN where there is a score.
  const double own =
      load_coefficient<double>(call.scores, call.table ? m * call.modalities + m : m);
  call.counted[m] = call.steps[m] + (call.table && isnan(own) ? 0 : 1);
}

}  // namespace

void launch_information_pull(const InformationPullParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.modalities + params.tensors, kThreads);
  launch("information_pull_kernel", information_pull_kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
