// Softmax of the true class, row by row; no include guard, see foreach_simd.h.

#include "cpu/simd/exp.h"

// The largest logit; NaN may be passed over, for the exponentials pass it on.
template <typename scalar_t>
inline float row_max(const scalar_t* x, int64_t n) {
  F32 vmax = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vmax = maximum(load(x + i), vmax);
  float max = vmax[0];
  for (int lane = 1; lane < kLanes; ++lane) max = std::max(max, vmax[lane]);
  for (; i < n; ++i) max = std::max(max, Element<scalar_t>::widen(x[i]));
  return max;
}

// sum of e^(x - max); kStore keeps the terms in `terms`, which has room for a vector more.
template <bool kStore, typename scalar_t>
inline float exp_row(const scalar_t* x, int64_t n, float max, float* terms) {
  F32 sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 term = exp_nonpositive(load(x + i) - max);
    if constexpr (kStore) store(terms + i, term);
    sum += term;
  }
  if (i < n && n >= kLanes) {
    // The last full vector, of which the first lanes are in the sum already.
    const int64_t at = n - kLanes;
    const F32 term = exp_nonpositive(load(x + at) - max);
    if constexpr (kStore) store(terms + at, term);
    sum += lane_index() < static_cast<int32_t>(i - at) ? F32{} : term;
  } else if (i < n) {
    const float nothing = -std::numeric_limits<float>::infinity();
    const F32 term = exp_nonpositive(load_first(x, n, nothing) - max);
    if constexpr (kStore) store(terms, term);
    sum += term;
  }
  return static_cast<float>(sum_lanes(sum));
}

inline double row_max(const double* x, int64_t n) {
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) max = std::max(max, x[i]);
  return max;
}

template <bool kStore>
inline double exp_row(const double* x, int64_t n, double max, double* terms) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double term = std::exp(x[i] - max);
    if constexpr (kStore) terms[i] = term;
    sum += term;
  }
  return sum;
}

inline void score_rows(const LogitRows& rows, const RowScores& out) {
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t label = rows.labels[i];
      if (label == kIgnoredLabel) continue;
      if (label < 0 || label >= rows.classes) {
        out.prob[i] = out.log_prob[i] = std::numeric_limits<double>::quiet_NaN();
        continue;
      }
      const scalar_t* x = static_cast<const scalar_t*>(rows.logits) + i * rows.classes;
      const acc_t max = row_max(x, rows.classes);
      const acc_t sum = exp_row<false>(x, rows.classes, max, static_cast<acc_t*>(nullptr));
      const acc_t below_max = Element<scalar_t>::widen(x[label]) - max;
      out.prob[i] = std::exp(below_max) / sum;
      out.log_prob[i] = below_max - std::log(sum);
    }
  });
}

template <typename scalar_t>
inline void grad_row(const scalar_t* x, int64_t label, int64_t classes, const RowGrads& grads,
                     acc_type<scalar_t>* terms, scalar_t* out) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  const acc_t sum = exp_row<true>(x, classes, row_max(x, classes), terms);
  const double slope = grads.grad_prob * (terms[label] / sum) + grads.grad_log_prob;
  const auto factor = splat(static_cast<acc_t>(-slope / sum));
  terms[label] -= sum;
  int64_t i = 0;
  for (; i + kWidth <= classes; i += kWidth) store(out + i, factor * load(terms + i));
  if (i < classes) store_first(out + i, classes - i, factor * load(terms + i));
}

inline void grad_rows(const LogitRows& rows, const RowGrads& grads) {
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc_t = acc_type<scalar_t>;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t label = rows.labels[i];
      const scalar_t* x = static_cast<const scalar_t*>(rows.logits) + i * rows.classes;
      scalar_t* out = static_cast<scalar_t*>(grads.grad_logits) + i * rows.classes;
      if (label >= 0 && label < rows.classes) {
        grad_row(x, label, rows.classes, grads, static_cast<acc_t*>(grads.terms), out);
        continue;
      }
      const acc_t nan = std::numeric_limits<acc_t>::quiet_NaN();
      const auto fill = splat(label == kIgnoredLabel ? acc_t(0) : nan);
      for (int64_t c = 0; c < rows.classes; c += lanes_of<scalar_t>) {
        store_first(out + c, std::min<int64_t>(lanes_of<scalar_t>, rows.classes - c), fill);
      }
    }
  });
}
