// The decision of OGM and OGM-GE: discrepancy ratios, coefficients, the noise's standard deviation.
#pragma once

#include <math.h>

#include "host_device.h"

namespace mmfuse {

struct ModulationRule {
  double alpha;
  bool cvpr;  // CVPR Eq. 10 rather than TPAMI Eq. 11
};

// The mean over j != m of S_m / S_j; score(j) is S_j.
template <typename F>
MMFUSE_HD double discrepancy_ratio(const F& score, int64_t m, int64_t modalities) {
  const double own = score(m);
  double sum = 0;
  for (int64_t j = 0; j < modalities; ++j) {
    if (j != m) sum += own / score(j);
  }
  return sum / static_cast<double>(modalities - 1);
}

MMFUSE_HD double modulation_coefficient(double ratio, const ModulationRule& rule) {
  const double x = rule.cvpr ? (ratio > 1 ? rule.alpha * ratio : 0) : ratio - 1;
  if (!(x > 0)) return 1;  // also for a NaN
  if (rule.cvpr) return 1 - tanh(x);
  const double k = 1 - rule.alpha * tanh(x);
  return k > 0 ? k : 0;
}

// One element has no standard deviation.
MMFUSE_HD double modulation_noise(int64_t n, double m2, double eps) {
  return n > 1 ? sqrt(m2 / static_cast<double>(n - 1)) + eps : 0;
}

}  // namespace mmfuse
