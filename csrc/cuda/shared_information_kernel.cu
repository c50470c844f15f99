#include "common/shared_information.h"
#include "cuda/device/launch.h"
#include "shared_information.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 128;

// A thread has one pair of variables of one problem; on the diagonal, the variable alone.
__global__ void __launch_bounds__(kThreads)
    shared_information_kernel(const SharedInformationParams __grid_constant__ params) {
  const int64_t count = params.variables, problems = params.problems;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count * count * problems) return;
  const int64_t p = i % problems, j = i / problems % count, m = i / problems / count;
  if (m == j) {
    const double share = shared_alone(params.pairs + (m * problems + p) * kPairEntropies);
    params.nmi[m * problems + p] = share;
    params.ncmi[i] = 0 * share;  // or NaN
    return;
  }
  const int64_t place = m < j ? pair_place(m, j, count) : pair_place(j, m, count);
  const double* h = params.triples + (place * problems + p) * kTripleEntropies;
  params.ncmi[i] = m < j ? shared_given_second(h) : shared_given_first(h);
}

}  // namespace

void launch_shared_information(const SharedInformationParams& params, cudaStream_t stream) {
  const int64_t work = params.variables * params.variables * params.problems;
  if (work == 0) return;
  launch("shared_information_kernel", shared_information_kernel,
         static_cast<unsigned>((work + kThreads - 1) / kThreads), kThreads, stream, params);
}

}  // namespace mmfuse::cuda
