// shared_information: what variables share with a target, from the entropies of joint histograms.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmfuse::cuda {

struct SharedInformationParams {
  int64_t variables;      // M
  int64_t problems;       // P
  const double* pairs;    // [M, P, 3] entropies of (m, c)
  const double* triples;  // [M (M - 1) / 2, P, 7] of (m, j, c), m < j
  double* nmi;            // [M, P]
  double* ncmi;           // [M, M, P]
};

void launch_shared_information(const SharedInformationParams& params, cudaStream_t stream);

}  // namespace mmfuse::cuda
