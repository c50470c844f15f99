// The decision of OGM, OGM-GE and MLB: ratios, coefficients, the noise's standard deviation.
#pragma once

#include <math.h>

#include "host_device.h"

namespace mmfuse {

// In the order of mmfuse/reference/modulation_factors.py.
enum class ModulationFormula : int64_t { kTpami, kCvpr, kMlb };

struct ModulationRule {
  double alpha;
  double beta;  // of MLB
  ModulationFormula formula;
};

// The mean over j != m of S_m / S_j, which is above 1 for one that is ahead; for MLB that of
// S_j / S_m, above 1 for one that is behind. score(j) is S_j.
template <typename F>
MMFUSE_HD double modulation_ratio(const F& score, int64_t m, int64_t modalities,
                                  const ModulationRule& rule) {
  const bool behind = rule.formula == ModulationFormula::kMlb;
  const double own = score(m);
  double sum = 0;
  for (int64_t j = 0; j < modalities; ++j) {
    if (j != m) sum += behind ? score(j) : own / score(j);
  }
  const double mean = sum / static_cast<double>(modalities - 1);
  return behind ? mean / own : mean;
}

MMFUSE_HD double modulation_coefficient(double ratio, const ModulationRule& rule) {
  if (rule.formula == ModulationFormula::kMlb) {
    const double change = tanh(rule.alpha * (ratio - 1));
    const double k = 1 + (ratio > 1 ? (rule.beta - 1) * change : change);
    return k == k ? k : 1;
  }
  const bool cvpr = rule.formula == ModulationFormula::kCvpr;
  const double x = cvpr ? (ratio > 1 ? rule.alpha * ratio : 0) : ratio - 1;
  if (!(x > 0)) return 1;  // also for a NaN
  if (cvpr) return 1 - tanh(x);
  const double k = 1 - rule.alpha * tanh(x);
  return k > 0 ? k : 0;
}

// One element has no standard deviation.
MMFUSE_HD double modulation_noise(int64_t n, double m2, double eps) {
  return n > 1 ? sqrt(m2 / static_cast<double>(n - 1)) + eps : 0;
}

}  // namespace mmfuse
