// Prints, bit for bit, what the kernels that compare scores make of numbers whose products are
// rounded. test_fused_products.py builds it with and without fused multiplications and additions.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/information.h"
#include "cuda/information_pull.h"
#include "cuda/redundancy_pull.h"

namespace {

constexpr int64_t kModalities = 40, kColumns = 4;

std::vector<double> numbers(int64_t count, uint32_t seed) {
  std::vector<double> made(count);
  for (double& x : made) x = (seed = seed * 1664525u + 1013904223u) / 4294967295.0;
  return made;
}

void print(const char* name, const std::vector<double>& values) {
  for (const double x : values) std::printf("%s %a\n", name, x);
}

mmfuse::cuda::Coefficients wide(const std::vector<double>& values) { return {values.data(), true}; }

std::vector<double> scores_with_equals() {
  std::vector<double> scores = numbers(kModalities, 1);
  scores[1] = scores[0];
  return scores;
}

// In the kernel a branch, for scores without a count, happens to keep compilers from fusing.
void print_gaps() {
  const std::vector<double> scores = scores_with_equals();
  const auto score = [&](int64_t k) { return mmfuse::rounded_product(scores[k], 3.0); };
  const mmfuse::Compared<decltype(score)> compared{score, kModalities, false};
  std::vector<double> gaps(kModalities);
  for (int64_t m = 0; m < kModalities; ++m) gaps[m] = information_gap(compared, m);
  print("gap", gaps);
}

void print_information_pull(const std::vector<double>& counts) {
  const std::vector<double> scores = scores_with_equals();
  const bool open[kModalities] = {true, true};
  const std::vector<int64_t> steps(kModalities);
  std::vector<int64_t> counted(kModalities);
  std::vector<double> coefficients(kModalities), gap(kModalities);
  mmfuse::cuda::InformationPullParams call{};
  call.scores = wide(scores);
  call.modalities = kModalities;
  call.counts = wide(counts);
  call.one_count = counts.size() == 1;
  call.open = open;
  call.steps = steps.data();
  call.beta = 0.9;
  call.coefficients = coefficients.data();
  call.gap = gap.data();
  call.counted = counted.data();
  launch_information_pull(call, nullptr);
  print("gap", gap);
}

void print_redundancy_pull() {
  const std::vector<double> scores = numbers(kModalities, 2), measured = numbers(kModalities, 3),
                            last = numbers(kModalities, 4), average = numbers(kModalities, 5),
                            weight = numbers(kModalities, 6), gate = {1.0},
                            history = numbers(kModalities * kColumns, 7);
  const std::vector<int64_t> steps(kModalities, kColumns);
  std::vector<int64_t> counted(kModalities);
  std::vector<double> found[7];
  for (auto& x : found) x.resize(kModalities * kColumns);
  mmfuse::cuda::RedundancyPullParams call{};
  call.scores = wide(scores);
  call.modalities = kModalities;
  call.measured = wide(measured);
  call.gate = wide(gate);
  call.history = history.data();
  call.columns = kColumns;
  call.steps = steps.data();
  call.old = {last.data(), average.data(), weight.data()};
  call.rule = {0.9, 0.6, 0.9, 0.15, true};
  call.coefficients = found[0].data();
  call.growth = found[1].data();
  call.phase = found[2].data();
  call.later = found[3].data();
  call.counted = counted.data();
  call.last = found[4].data();
  call.average = found[5].data();
  call.weight = found[6].data();
  launch_redundancy_pull(call, nullptr);
  const char* names[] = {"growth", "phase", "average", "weight"};
  const int places[] = {1, 2, 5, 6};
  for (int k = 0; k < 4; ++k) {
    found[places[k]].resize(kModalities);
    print(names[k], found[places[k]]);
  }
}

}  // namespace

int main() {
  print_gaps();
  print_information_pull({3.0});
  print_information_pull(std::vector<double>(kModalities, 3.0));
  print_redundancy_pull();
}
