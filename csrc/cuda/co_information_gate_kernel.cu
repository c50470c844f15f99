#include "co_information_gate.h"
#include "cuda/device/partial_sums.h"

namespace mmfuse::cuda {
namespace {

template <typename acc_t>
struct StoreGate {
  acc_t* gate;
  Coefficients threshold;
  int64_t cosines;

  __device__ void operator()(double sum) const {
    // Compared as paired_cosine would return it. NaN, also that of an empty batch, is not above.
    const acc_t mean = static_cast<acc_t>(sum / static_cast<double>(cosines));
    *gate = mean > load_coefficient<acc_t>(threshold, 0) ? acc_t(1) : acc_t(0);
  }
};

template <typename acc_t>
void launch_gate(const CoInformationGateParams& params, cudaStream_t stream) {
  const CosineSumsParams& sums = params.sums;
  const int64_t pairs = static_cast<int64_t>(sums.pairs.size());
  launch_partial_sums(
      sums.partials, pairs * cosine_blocks(sums.rows, sums.columns),
      StoreGate<acc_t>{static_cast<acc_t*>(params.gate), params.threshold, pairs * sums.rows},
      stream);
}

}  // namespace

void launch_co_information_gate(const CoInformationGateParams& params, cudaStream_t stream) {
  launch_cosine_sums(params.sums, stream);
  if (params.sums.dtype == DType::kFloat64) {
    launch_gate<double>(params, stream);
  } else {
    launch_gate<float>(params, stream);
  }
}

}  // namespace mmfuse::cuda
