#include "common/redundancy.h"
#include "glue/coefficients.h"
#include "glue/redundancy.h"

namespace mmfuse::cpu {
namespace {

// <d, g> and <g, g> of each tensor.
struct Products {
  std::vector<double> dots;
  std::vector<double> squares;
};

Products products_of(const RedundancyMoments& moments, const int64_t* owner, int64_t tensors,
                     int64_t modalities, bool by_encoder) {
  const int64_t* sizes = indices_of(*moments.numel, tensors, "numel");
  const Coefficients means(*moments.mean, tensors, "mean");
  const Coefficients m2(*moments.m2, tensors, "m2");
  const Coefficients dots(*moments.dot, tensors, "dot");
  Products found{std::vector<double>(tensors), std::vector<double>(tensors)};
  for (int64_t t = 0; t < tensors; ++t) {
    found.dots[t] = dots[t];
    found.squares[t] = square_norm(m2[t], means[t], sizes[t]);
  }
  if (!by_encoder) return found;
  Products sums{std::vector<double>(modalities), std::vector<double>(modalities)};
  for (int64_t t = 0; t < tensors; ++t) {
    sums.dots[owner[t]] += found.dots[t];
    sums.squares[owner[t]] += found.squares[t];
  }
  for (int64_t t = 0; t < tensors; ++t) {
    found.dots[t] = sums.dots[owner[t]];
    found.squares[t] = sums.squares[owner[t]];
  }
  return found;
}

}  // namespace

RedundancyResults redundancy_pull(const Tensor& scores, const std::optional<Tensor>& redundancy,
                                  const Tensor& gate, const Tensor& history, const Tensor& steps,
                                  const Tensor& last, const Tensor& average, const Tensor& weight,
                                  const Tensor& owner, const std::optional<Tensor>& numel,
                                  const std::optional<Tensor>& mean,
                                  const std::optional<Tensor>& m2, const std::optional<Tensor>& dot,
                                  double momentum, double gamma, double beta, double threshold,
                                  bool unbiased, bool by_encoder) {
  const RedundancyRule rule{momentum, gamma, beta, threshold, unbiased};
  const RedundancyMoments moments{numel, mean, m2, dot};
  const int64_t modalities = scores.size(0);
  const int64_t columns = history.size(1);
  const int64_t tensors = check_redundancy(scores, history, moments) ? owner.numel() : 0;
  const int64_t* owners = indices_of(owner, owner.numel(), "owner");
  const Coefficients numbers(scores, scores.numel(), "scores");
  const auto score = [&](int64_t i) { return numbers[i]; };
  const Compared<decltype(score)> compared{score, modalities, scores.dim() == 2};
  std::optional<Coefficients> measured;
  if (redundancy) measured.emplace(*redundancy, modalities, "redundancy");
  const double opened = Coefficients(gate, 1, "gate")[0];
  const double* gains = doubles_of(history, modalities * columns, "history");
  const int64_t* before = indices_of(steps, modalities, "steps");
  const Redundancies old{doubles_of(last, modalities, "redundancy"),
                         doubles_of(average, modalities, "average"),
                         doubles_of(weight, modalities, "weight")};

  Tensor coefficients = empty_on_cpu({modalities}, scores.scalar_type());
  const auto vector = [&] { return empty_on_cpu({modalities}, ScalarType::Double); };
  const auto writable = [](Tensor& tensor) {
    return static_cast<double*>(tensor.mutable_data_ptr());
  };
  Tensor growths = vector();
  Tensor phases = vector();
  Tensor later = empty_on_cpu({modalities, columns}, ScalarType::Double);
  Tensor counted = empty_on_cpu({modalities}, ScalarType::Long);
  Tensor last_now = vector();
  Tensor average_now = vector();
  Tensor weight_now = vector();
  const Numbers decided(coefficients);
  int64_t* after = static_cast<int64_t*>(counted.mutable_data_ptr());
  for (int64_t m = 0; m < modalities; ++m) {
    const double h = compared.own(m);
    const bool counts = isfinite(h);
    double* row = writable(later) + m * columns;
    for (int64_t k = 0; k < columns; ++k) {
      row[k] = gain_after(gains + m * columns, k, columns - 1, h, counts);
    }
    after[m] = before[m] + (counts ? 1 : 0);
    Redundancy now = old[m];
    if (measured) now = redundancy_after(now, (*measured)[m], counts, momentum);
    const double growth = gain_growth([&](int64_t k) { return row[k]; }, columns - 1, after[m]);
    const double phase = redundancy_phase(now, growth, rule);
    writable(growths)[m] = growth;
    writable(phases)[m] = phase;
    writable(last_now)[m] = now.last;
    writable(average_now)[m] = now.average;
    writable(weight_now)[m] = now.weight;
    decided.set(m, redundancy_strength(compared, m, phase, rule) * opened);
  }

  const ScalarType like = dot ? dot->scalar_type() : scores.scalar_type();
  Tensor scale = empty_on_cpu({tensors}, like);
  Tensor pull = empty_on_cpu({tensors}, like);
  if (tensors > 0) {
    const Coefficients known(coefficients, modalities, "coefficients");
    const Products products = products_of(moments, owners, tensors, modalities, by_encoder);
    const Numbers pulls(pull);
    for (int64_t t = 0; t < tensors; ++t) pulls.set(t, known[owners[t]]);
    const Coefficients rounded(pull, tensors, "pull");
    const Numbers scales(scale);
    for (int64_t t = 0; t < tensors; ++t) {
      scales.set(t, orthogonal_scale(rounded[t], products.dots[t], products.squares[t]));
    }
  }
  return {coefficients, growths,     phases,     later, counted,
          last_now,     average_now, weight_now, scale, pull};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("redundancy_pull.cpu", TORCH_BOX(&mmfuse::cpu::redundancy_pull));
}
