// Targets and weights of rows of logits, as vectors; no include guard, see foreach_simd.h.

#include "cpu/simd/exp.h"
#include "cpu/simd/log.h"

inline F64 maximum(F64 a, F64 b) { return a > b ? a : b; }

// The vector at p, of which n elements are left; the other lanes hold `rest`, or are not stored.
template <typename scalar_t>
inline vec_type<scalar_t> load_some(const scalar_t* p, int64_t n, acc_type<scalar_t> rest) {
  return n >= lanes_of<scalar_t> ? load(p) : load_first(p, n, rest);
}

template <typename scalar_t>
inline void store_some(scalar_t* p, int64_t n, vec_type<scalar_t> x) {
  n >= lanes_of<scalar_t> ? store(p, x) : store_first(p, n, x);
}

// a * x, and 0 for a share of nothing, whatever x is.
template <typename vec_t>
inline vec_t shared(vec_t a, vec_t x) {
  return a == 0 ? vec_t{} : a * x;
}

// n targets from element `first` on, NaN outside of [0, 1]; zeros fill the last vector.
template <typename acc_t>
inline void read_targets(const LogitRows& rows, int64_t first, int64_t stride, int64_t n,
                         acc_t* out) {
  constexpr int kWidth = lanes_of<acc_t>;
  visit_dtype(rows.target_dtype, [&](auto* type) {
    using target_t = std::remove_pointer_t<decltype(type)>;
    const target_t* t = static_cast<const target_t*>(rows.targets) + first;
    int64_t j = 0;
    if constexpr (std::is_same_v<acc_type<target_t>, acc_t>) {
      if (stride == 1) {
        for (; j + kWidth <= n; j += kWidth) store(out + j, load(t + j));
      }
    }
    for (; j < n; ++j) out[j] = static_cast<acc_t>(Element<target_t>::widen(t[j * stride]));
  });
  for (int64_t j = n; j % kWidth != 0; ++j) out[j] = 0;
  for (int64_t j = 0; j < n; j += kWidth) {
    const auto t = load(out + j);
    const auto inside = (t >= acc_t(0)) & (t <= acc_t(1));
    store(out + j, inside ? t : splat(std::numeric_limits<acc_t>::quiet_NaN()));
  }
}

// A label's likelihood under z, and the derivative of its logarithm.
template <typename vec_t>
struct Likelihood {
  vec_t prob;
  vec_t log_prob;
  vec_t slope;
};

template <typename vec_t>
inline Likelihood<vec_t> likelihood(vec_t z, vec_t y) {
  const vec_t zero{}, one = zero + 1;
  const vec_t e = exp_nonpositive(z < zero ? z : -z);
  const vec_t u = one + e;
  // The part of e that 1 + e has rounded away, for log1p.
  const vec_t rest = e - (u - one);
  const vec_t no = shared(one - y, z > zero ? z : zero);
  const vec_t yes = shared(y, z < zero ? -z : zero);
  const vec_t log_prob = -(log_of_normal(u) + rest + no + yes);
  return {exp_nonpositive(log_prob), log_prob, y - (z < zero ? e : one) / u};
}

// The share of labels with targets y in their row's score: w(pos y + 1 - y).
template <typename vec_t>
inline vec_t label_share(vec_t y, vec_t weight, vec_t pos_weight) {
  return weight * (pos_weight * y + (1 - y));
}

template <typename acc_t>
inline vec_type<acc_t> weights_at(const acc_t* weights, int64_t c) {
  return weights == nullptr ? splat(acc_t(1)) : load(weights + c);
}

template <typename acc_t>
inline vec_type<acc_t> weight_of(const acc_t* weights, int64_t c) {
  return splat(weights == nullptr ? acc_t(1) : weights[c]);
}

// How much a row with this class index counts; NaN if there is no such class to weigh.
inline double index_weight(const LogitRows& rows, int64_t label) {
  if (label == rows.ignore_index) return 0;
  if (rows.weight.wide == nullptr) return 1;
  const bool possible = label >= 0 && label < rows.classes;
  return possible ? rows.weight.wide[label] : std::numeric_limits<double>::quiet_NaN();
}

// Stores a row's scores; those of a row that does not count are 0.
inline void put_scores(const RowScores& out, int64_t i, double prob, double log_prob,
                       double weight) {
  out.prob[i] = weight == 0 ? 0 : prob;
  out.log_prob[i] = weight == 0 ? 0 : log_prob;
  out.weight[i] = weight;
}

// Stores a row's statistics, likewise, after its scores.
inline void put_statistics(const RowStatistics& out, int64_t i, bool correct, double entropy,
                           double log_sum_exp, double abs_sum) {
  const bool counts = out.scores.weight[i] != 0;
  out.correct[i] = counts && correct;
  out.entropy[i] = counts ? entropy : 0;
  out.log_sum_exp[i] = counts ? log_sum_exp : 0;
  out.abs_sum[i] = counts ? abs_sum : 0;
}
