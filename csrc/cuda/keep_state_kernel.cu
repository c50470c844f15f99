#include <math.h>

#include <algorithm>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "keep_state.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;
// Tensors of one launch; no method has as many.
constexpr int kMost = 32;

struct Table {
  KeptTensor tensors[kMost];
  const bool* finite;
  Coefficients sums;
  int64_t count;
};

// A block for each tensor. Every block looks at all sums, so that none waits for another.
__global__ void __launch_bounds__(kThreads, 1)
    keep_state_kernel(const Table __grid_constant__ call) {
  int bad[1] = {*call.finite ? 0 : 1};
  for (int64_t t = threadIdx.x; t < call.count; t += kThreads) {
    bad[0] += isfinite(load_coefficient<double>(call.sums, t)) ? 0 : 1;
  }
  block_sum<kThreads>(bad);
  if (bad[0] != 0) return;
  const KeptTensor& kept = call.tensors[blockIdx.x];
  for (int64_t i = threadIdx.x; i < kept.bytes; i += kThreads) kept.state[i] = kept.value[i];
}

}  // namespace

void launch_keep_state(const KeepStateParams& params, cudaStream_t stream) {
  const size_t all = params.tensors.size();
  for (size_t first = 0; first < all; first += kMost) {
    const size_t count = std::min<size_t>(kMost, all - first);
    Table table{{}, params.finite, params.sums, params.count};
    std::copy_n(params.tensors.begin() + first, count, table.tensors);
    launch("keep_state_kernel", keep_state_kernel, static_cast<unsigned>(count), kThreads, stream,
           table);
  }
}

}  // namespace mmfuse::cuda
