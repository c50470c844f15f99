// RedReg's decision: growth of the gain, phase, strength, and a gradient's share of the pull.
#pragma once

#include <math.h>

#include "compared.h"

namespace mmfuse {

constexpr double kRedundancyEps = 1e-12;  // is added to denominators

struct RedundancyRule {
  double momentum;
  double gamma;
  double beta;
  double threshold;
  bool unbiased;  // the average is divided by what its coefficients add up to
};

struct Redundancy {
  double last;
  double average;
  double weight;  // what the average's coefficients add up to
};

// [M] each, on the device.
struct Redundancies {
  const double* last;
  const double* average;
  const double* weight;

  MMFUSE_HD Redundancy operator[](int64_t m) const { return {last[m], average[m], weight[m]}; }
};

// After a step with a monitor. `counts` says that the modality has a score in this step.
MMFUSE_HD Redundancy redundancy_after(const Redundancy& old, double measured, bool counts,
                                      double momentum) {
  Redundancy now = old;
  if (counts) now.last = measured;
  if (isfinite(measured)) {
    now.average = rounded_product(momentum, old.average) + rounded_product(1 - momentum, measured);
    now.weight = rounded_product(momentum, old.weight) + (1 - momentum);
  }
  return now;
}

// The k-th of the last W + 1 gains after a step whose gain enters them if it counts.
MMFUSE_HD double gain_after(const double* old, int64_t k, int64_t window, double h, bool counts) {
  if (!counts) return old[k];
  return k < window ? old[k + 1] : h;
}

// 1 until there are W gains before the last; gain(k) is the k-th of W + 1.
template <typename F>
MMFUSE_HD double gain_growth(const F& gain, int64_t window, int64_t steps) {
  if (steps <= window) return 1;
  double sum = 0;
  for (int64_t k = 0; k < window; ++k) sum += gain(k);
  const double least = rounded_product(static_cast<double>(window), kRedundancyEps);
  return (gain(window) - gain(0)) / (fabs(sum) + least);
}

// Is compared with a threshold: rounded step by step, as the reference is.
MMFUSE_HD double redundancy_phase(const Redundancy& now, double growth,
                                  const RedundancyRule& rule) {
  const double average = rule.unbiased ? now.average / now.weight : now.average;
  const double growing = growth < 0 ? 0 : growth;  // a NaN stays one
  return now.last / (average + kRedundancyEps) - rounded_product(rule.gamma, growing);
}

// The strength of the one modality ahead of all others, if it is redundant; 0 for the rest.
template <typename F>
MMFUSE_HD double redundancy_strength(const Compared<F>& compared, int64_t m, double phase,
                                     const RedundancyRule& rule) {
  if (!(phase > rule.threshold)) return 0;
  double sum = 0;
  int64_t others = 0;
  for (int64_t j = 0; j < compared.modalities; ++j) {
    if (j == m || compared.apart(m, j)) continue;
    const double ahead = compared.ahead(m, j);
    if (!(ahead > 0)) return 0;
    sum += ahead;
    ++others;
  }
  return others > 0 ? exp(rule.beta * tanh(sum / static_cast<double>(others))) : 0;
}

MMFUSE_HD double square_norm(double m2, double mean, int64_t numel) {
  return m2 + mean * mean * static_cast<double>(numel);
}

// The gradient's factor when the displacement's part along it is left out.
MMFUSE_HD double orthogonal_scale(double pull, double dot, double square) {
  // 1 outright where nothing is pulled: there the share may be anything.
  return pull == 0 ? 1 : 1 - pull * (dot / (square + kRedundancyEps));
}

}  // namespace mmfuse
