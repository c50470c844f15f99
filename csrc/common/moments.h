// Count, mean and centred second moment, merged with Chan, Golub & LeVeque's pairwise update
// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mmfuse {

// dot = <w - w0, g> and disp_sq = |w - w0|^2 are plain sums; they stay 0 without anchors.
template <typename acc_t>
struct Moments {
  int64_t n = 0;
  acc_t mean = 0;
  acc_t m2 = 0;
  acc_t dot = 0;
  acc_t disp_sq = 0;
};

template <typename acc_t>
MMFUSE_HD Moments<acc_t> merge_moments(const Moments<acc_t>& a, const Moments<acc_t>& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  Moments<acc_t> out;
  out.n = a.n + b.n;
  const acc_t delta = b.mean - a.mean;
  const acc_t share = static_cast<acc_t>(b.n) / static_cast<acc_t>(out.n);
  out.mean = a.mean + delta * share;
  out.m2 = a.m2 + b.m2 + delta * delta * (static_cast<acc_t>(a.n) * share);
  out.dot = a.dot + b.dot;
  out.disp_sq = a.disp_sq + b.disp_sq;
  return out;
}

}  // namespace mmfuse
