#include "common/shared_information.h"

#include "glue/joint_counter.h"

namespace mmfuse::cpu {
std::tuple<Tensor, Tensor> shared_information(const TensorList& data, int64_t bins,
                                              int64_t conditional_bins) {
  STD_TORCH_CHECK(data.size() >= 2 && data[0].dim() == 2,
                  "mmfuse: data must be [P, N], at least two of them");
  const int64_t count = static_cast<int64_t>(data.size()) - 1;
  const int64_t problems = data[0].size(0);
  std::vector<int64_t> pairs, triples;
  for (int64_t m = 0; m < count; ++m) {
    pairs.insert(pairs.end(), {m, count});
    for (int64_t j = m + 1; j < count; ++j) triples.insert(triples.end(), {m, j, count});
  }
  const int64_t others = count * (count - 1) / 2;
  const int64_t of_pairs = count * problems, of_triples = others * problems;
  std::vector<int64_t> counts(of_pairs * joint_cells(2, bins) +
                              of_triples * joint_cells(3, conditional_bins));
  std::vector<double> entropies(of_pairs * kPairEntropies + of_triples * kTripleEntropies);
  std::vector<JointTables> tables{
      {std::move(pairs), 2, static_cast<int>(bins), counts.data(), entropies.data()}};
  if (others > 0) {
    tables.push_back({std::move(triples), 3, static_cast<int>(conditional_bins),
                      counts.data() + of_pairs * joint_cells(2, bins),
                      entropies.data() + of_pairs * kPairEntropies});
  }
  count_jointly(data, tables);

  Tensor nmi = empty_on_cpu({count, problems}, ScalarType::Double);
  Tensor ncmi = empty_on_cpu({count, count, problems}, ScalarType::Double);
  double* alone = static_cast<double*>(nmi.mutable_data_ptr());
  double* given = static_cast<double*>(ncmi.mutable_data_ptr());
  const double* h = entropies.data();
  for (int64_t i = 0; i < of_pairs; ++i, h += kPairEntropies) alone[i] = shared_alone(h);
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t p = 0; p < problems; ++p) {
      given[(m * count + m) * problems + p] = 0 * alone[m * problems + p];  // or NaN
    }
    for (int64_t j = m + 1; j < count; ++j) {
      for (int64_t p = 0; p < problems; ++p, h += kTripleEntropies) {
        given[(m * count + j) * problems + p] = shared_given_second(h);
        given[(j * count + m) * problems + p] = shared_given_first(h);
      }
    }
  }
  return {nmi, ncmi};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("shared_information.cpu", TORCH_BOX(&mmfuse::cpu::shared_information));
}
