// CGGM's decision: the share of the other modalities in what all have gained since the last step.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace mmfuse {

// In mmfuse/reference/progress_factors.py as well.
constexpr double kProgressEps = 1e-8;

struct ProgressRule {
  double rho;
  double bound;  // of |k|; infinite for none
};

// M scores, or a table of them, that of m over the samples that m and j have; and the last table.
template <typename F, typename G>
struct Progress {
  F score;  // of an index into the numbers
  G last;
  int64_t modalities;
  bool table;

  // m's score over the samples that m and j have; without a table over all.
  MMFUSE_HD double now(int64_t m, int64_t j) const { return score(table ? m * modalities + j : m); }

  MMFUSE_HD double change(int64_t m, int64_t j) const {
    return now(m, j) - last(m * modalities + (table ? j : m));
  }

  // The score to remember, which of samples that are not there is the one before.
  MMFUSE_HD double kept(int64_t m, int64_t j) const {
    const double x = now(m, j);
    return x == x ? x : last(m * modalities + j);
  }
};

// k of modality m; NaN for one that shares no sample with another.
template <typename F, typename G>
MMFUSE_HD double progress_share(const Progress<F, G>& progress, int64_t m, double bound) {
  double others = 0, mine = 0;
  int64_t compared = 0;
  for (int64_t j = 0; j < progress.modalities; ++j) {
    const double theirs = progress.change(j, m), ours = progress.change(m, j);
    if (j == m || theirs != theirs || ours != ours) continue;
    others += theirs;
    mine += ours;
    ++compared;
  }
  if (compared == 0) return static_cast<double>(NAN);
  // Without a table all of them are the same number, whose mean would be rounded.
  mine = progress.table ? mine / static_cast<double>(compared) : progress.change(m, m);
  const double share = (others + kProgressEps) / (others + mine + kProgressEps);
  return share < -bound ? -bound : share > bound ? bound : share;
}

MMFUSE_HD double progress_coefficient(double share, const ProgressRule& rule) {
  return share == share ? rule.rho * share : 1;
}

}  // namespace mmfuse
