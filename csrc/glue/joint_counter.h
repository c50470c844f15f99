// Joint histograms of several orders and numbers of bins over the same data, in one go.
#pragma once

#include <cstdint>
#include <vector>

#include "glue/tensors.h"

namespace mmfuse::cpu {

// Histograms of Q pairs or triples, [Q, problems, bins^order], and their margins' entropies,
// [Q, problems, 2^order - 1].
struct JointTables {
  std::vector<int64_t> tuples;
  int order;
  int bins;
  int64_t* counts;
  double* entropies;
};

// Fills all tables: the range of each variable is looked for once.
void count_jointly(const TensorList& data, const std::vector<JointTables>& tables);

// bins^order; an error where these are out of range.
int64_t joint_cells(int64_t order, int64_t bins);

}  // namespace mmfuse::cpu
