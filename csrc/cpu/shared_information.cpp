#include "common/shared_information.h"

#include <algorithm>

#include "glue/joint_counter.h"

namespace mmfuse::cpu {
namespace {

// Counts that are held at a time, 256 MiB; more take their problems in turn.
constexpr int64_t kMostCounts = int64_t{1} << 25;

// nmi [M, P] and ncmi [M, M, P] of P problems, of which those in `data` begin with `first`.
struct Shares {
  double* alone;
  double* given;
  int64_t problems;
  int64_t first;
};

void fill_shares(const TensorList& data, int64_t bins, int64_t conditional_bins,
                 const Shares& out) {
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

  double* alone = out.alone + out.first;
  double* given = out.given + out.first;
  const double* h = entropies.data();
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t p = 0; p < problems; ++p, h += kPairEntropies) {
      alone[m * out.problems + p] = shared_alone(h);
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t p = 0; p < problems; ++p) {
      given[(m * count + m) * out.problems + p] = 0 * alone[m * out.problems + p];  // or NaN
    }
    for (int64_t j = m + 1; j < count; ++j) {
      for (int64_t p = 0; p < problems; ++p, h += kTripleEntropies) {
        given[(m * count + j) * out.problems + p] = shared_given_second(h);
        given[(j * count + m) * out.problems + p] = shared_given_first(h);
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> shared_information(const TensorList& data, int64_t bins,
                                              int64_t conditional_bins) {
  STD_TORCH_CHECK(data.size() >= 2 && data[0].dim() == 2,
                  "mmfuse: data must be [P, N], at least two of them");
  const int64_t count = static_cast<int64_t>(data.size()) - 1;
  const int64_t problems = data[0].size(0);
  Tensor nmi = empty_on_cpu({count, problems}, ScalarType::Double);
  Tensor ncmi = empty_on_cpu({count, count, problems}, ScalarType::Double);
  Shares out{static_cast<double*>(nmi.mutable_data_ptr()),
             static_cast<double*>(ncmi.mutable_data_ptr()), problems, 0};
  const int64_t counts =
      count * joint_cells(2, bins) + count * (count - 1) / 2 * joint_cells(3, conditional_bins);
  const int64_t step = std::max<int64_t>(1, kMostCounts / counts);
  if (problems <= step) {
    fill_shares(data, bins, conditional_bins, out);
    return {nmi, ncmi};
  }
  for (; out.first < problems; out.first += step) {
    TensorList part;
    for (Tensor x : data) {
      // A part would not show it.
      STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == problems, "mmfuse: data must be of one shape");
      const int64_t length = std::min(step, problems - out.first);
      part.push_back(torch::stable::narrow(x, 0, out.first, length));
    }
    fill_shares(part, bins, conditional_bins, out);
  }
  return {nmi, ncmi};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("shared_information.cpu", TORCH_BOX(&mmfuse::cpu::shared_information));
}
