// InfoReg's decision: the information gap and the strength of the pull.
#pragma once

#include <math.h>

#include "compared.h"

namespace mmfuse {

// The mean over the modalities that m is ahead of; 0 if there are none.
template <typename F>
MMFUSE_HD double information_gap(const Compared<F>& compared, int64_t m) {
  double sum = 0;
  int64_t behind = 0;
  for (int64_t j = 0; j < compared.modalities; ++j) {
    const double ahead = compared.ahead(m, j);
    if (!(ahead > 0)) continue;  // also for a NaN
    sum += ahead;
    ++behind;
  }
  return behind > 0 ? sum / static_cast<double>(behind) : 0;
}

MMFUSE_HD double information_strength(double gap, bool open, double beta, double multiplier) {
  return open && gap > 0 ? multiplier * exp(beta * tanh(gap)) : 0;
}

}  // namespace mmfuse
