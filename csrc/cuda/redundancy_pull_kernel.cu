#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "redundancy_pull.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// All that is decided about a modality.
struct Decided {
  bool counts;
  int64_t steps;
  Redundancy now;
  double growth;
  double phase;
  double coefficient;
};

template <typename F>
__device__ __forceinline__ Decided decide(const RedundancyPullParams& call,
                                          const Compared<F>& compared, int64_t m) {
  Decided found{};
  const double h = compared.own(m);
  found.counts = isfinite(h);
  found.steps = call.steps[m] + (found.counts ? 1 : 0);
  found.now = call.old[m];
  if (call.measured.values != nullptr) {
    const double measured = load_coefficient<double>(call.measured, m);
    found.now = redundancy_after(found.now, measured, found.counts, call.rule.momentum);
  }
  const double* row = call.history + m * call.columns;
  const int64_t window = call.columns - 1;
  const auto gain = [&](int64_t k) { return gain_after(row, k, window, h, found.counts); };
  found.growth = gain_growth(gain, window, found.steps);
  found.phase = redundancy_phase(found.now, found.growth, call.rule);
  const double strength = redundancy_strength(compared, m, found.phase, call.rule);
  found.coefficient = strength * load_coefficient<double>(call.gate, 0);
  return found;
}

// <d, g> and <g, g> of one tensor, or of all of its encoder.
__device__ __forceinline__ void products(const RedundancyPullParams& call, int64_t t, double& dot,
                                         double& square) {
  const auto square_of = [&](int64_t u) {
    return square_norm(load_coefficient<double>(call.m2, u), load_coefficient<double>(call.mean, u),
                       call.numel[u]);
  };
  if (!call.by_encoder) {
    dot = load_coefficient<double>(call.dot, t);
    square = square_of(t);
    return;
  }
  dot = square = 0;
  for (int64_t u = 0; u < call.tensors; ++u) {
    if (call.owner[u] != call.owner[t]) continue;
    dot += load_coefficient<double>(call.dot, u);
    square += square_of(u);
  }
}

// The first threads decide about one modality each, the others about one tensor, for which they
// work out its owner's strength again: no thread waits for another.
__global__ void __launch_bounds__(kThreads, 1)
    redundancy_pull_kernel(const RedundancyPullParams __grid_constant__ call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t t = i - call.modalities;
  if (t >= call.tensors) return;
  const auto score = [&](int64_t k) { return load_coefficient<double>(call.scores, k); };
  const Compared<decltype(score)> compared{score, call.modalities, call.table};
  const int64_t m = t < 0 ? i : call.owner[t];
  const Decided found = decide(call, compared, m);
  if (t >= 0) {
    // Rounded as the modality's own is.
    double pull = call.scores.wide ? found.coefficient : static_cast<float>(found.coefficient);
    if (!call.dot.wide) pull = static_cast<float>(pull);
    double dot = 0;
    double square = 0;
    products(call, t, dot, square);
    store_result(call.pull, call.dot.wide, pull, t);
    store_result(call.scale, call.dot.wide, orthogonal_scale(pull, dot, square), t);
    return;
  }
  const double h = compared.own(m);
  const int64_t row = m * call.columns;
  for (int64_t k = 0; k < call.columns; ++k) {
    call.later[row + k] = gain_after(call.history + row, k, call.columns - 1, h, found.counts);
  }
  store_result(call.coefficients, call.scores.wide, found.coefficient, m);
  call.growth[m] = found.growth;
  call.phase[m] = found.phase;
  call.counted[m] = found.steps;
  call.last[m] = found.now.last;
  call.average[m] = found.now.average;
  call.weight[m] = found.now.weight;
}

}  // namespace

void launch_redundancy_pull(const RedundancyPullParams& params, cudaStream_t stream) {
  const int64_t blocks = chunk_count(params.modalities + params.tensors, kThreads);
  launch("redundancy_pull_kernel", redundancy_pull_kernel, blocks, kThreads, stream, params);
}

}  // namespace mmfuse::cuda
