// Scores of modalities that are compared with each other: of all samples, or pair by pair.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace mmfuse {

// M modalities' scores, or a table of them: that of m over the samples that have m and j.
template <typename F>
struct Compared {
  F score;  // of an index into the numbers
  int64_t modalities;
  bool table;

  // The lead of m over j; NaN where they share no sample.
  MMFUSE_HD double ahead(int64_t m, int64_t j) const {
    return table ? score(m * modalities + j) - score(j * modalities + m) : score(m) - score(j);
  }

  // True if no sample has both. Without a table a NaN is a score like any other.
  MMFUSE_HD bool apart(int64_t m, int64_t j) const {
    return table && (isnan(score(m * modalities + j)) || isnan(score(j * modalities + m)));
  }

  // m's score over all of its own samples; NaN for a modality that is missing.
  MMFUSE_HD double own(int64_t m) const { return score(table ? m * modalities + m : m); }
};

}  // namespace mmfuse
