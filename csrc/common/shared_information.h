// Normalised informations of a variable m and a target c, from the entropies of their histograms.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace mmfuse {

constexpr int kPairEntropies = 3, kTripleEntropies = 7;

// 2 I over the sum of both entropies, in [0, 1]; 0 where both are, which come out as a few rounding
// errors. NaN stays.
MMFUSE_HD double normalised(double twice_mi, double total) {
  constexpr double kLeast = 0x1p-44;
  const double share = twice_mi / (total <= kLeast ? total + 1 : total);
  return share < 0 ? 0 : share > 1 ? 1 : share;
}

// nmi, from h = H(m), H(c), H(m, c).
MMFUSE_HD double shared_alone(const double* h) {
  return normalised(2 * (h[0] + h[1] - h[2]), h[0] + h[1]);
}

// ncmi of m and c given j, from h = H(m), H(j), H(m, j), H(c), H(m, c), H(j, c), H(m, j, c).
MMFUSE_HD double shared_given_second(const double* h) {
  return normalised(2 * (h[2] + h[5] - h[6] - h[1]), h[2] + h[5] - 2 * h[1]);
}

// The same of j and c given m.
MMFUSE_HD double shared_given_first(const double* h) {
  return normalised(2 * (h[2] + h[4] - h[6] - h[0]), h[2] + h[4] - 2 * h[0]);
}

// Place of (m, j), m < j, among all such pairs of `count` variables.
MMFUSE_HD int64_t pair_place(int64_t m, int64_t j, int64_t count) {
  return m * (2 * count - m - 1) / 2 + j - m - 1;
}

}  // namespace mmfuse
