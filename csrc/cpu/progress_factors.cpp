#include "common/progress.h"
#include "glue/coefficients.h"

namespace mmfuse::cpu {

// Coefficients, progress and shares [M], scale [T], and the scores [M, M] and shares to remember.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> progress_factors(
    const Tensor& scores, const Tensor& last_scores, const Tensor& last_shares, const Tensor& owner,
    double rho, double bound, bool wide_scale) {
  const int64_t modalities = scores.size(0);
  const int64_t tensors = owner.numel();
  const Coefficients numbers(scores, scores.numel(), "scores");
  const Coefficients before(last_scores, modalities * modalities, "last_scores");
  const Coefficients shares_before(last_shares, modalities, "last_shares");
  const int64_t* owners = indices_of(owner, tensors, "owner");
  const ScalarType dtype = last_scores.scalar_type();
  Tensor coefficients = empty_on_cpu({modalities}, dtype);
  Tensor gains = empty_on_cpu({modalities}, dtype);
  Tensor shares = empty_on_cpu({modalities}, dtype);
  Tensor scale = empty_on_cpu({tensors}, wide_scale ? ScalarType::Double : ScalarType::Float);
  Tensor kept_scores = empty_on_cpu({modalities, modalities}, dtype);
  Tensor kept_shares = empty_on_cpu({modalities}, dtype);
  const auto score = [&](int64_t i) { return numbers[i]; };
  const auto last = [&](int64_t i) { return before[i]; };
  const Progress<decltype(score), decltype(last)> progress{score, last, modalities,
                                                           scores.dim() == 2};
  const ProgressRule rule{rho, bound};
  const Numbers decided(coefficients), gained(gains), share_of(shares), kept(kept_scores),
      kept_share(kept_shares);
  for (int64_t m = 0; m < modalities; ++m) {
    const double share = progress_share(progress, m, bound);
    decided.set(m, progress_coefficient(share, rule));
    gained.set(m, progress.change(m, m));
    share_of.set(m, share);
    kept_share.set(m, share == share ? share : shares_before[m]);
    for (int64_t j = 0; j < modalities; ++j) kept.set(m * modalities + j, progress.kept(m, j));
  }
  const Coefficients known(coefficients, modalities, "coefficients");
  const Numbers spread(scale);
  for (int64_t t = 0; t < tensors; ++t) spread.set(t, known[owners[t]]);
  return {coefficients, gains, shares, scale, kept_scores, kept_shares};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("progress_factors.cpu", TORCH_BOX(&mmfuse::cpu::progress_factors));
}
