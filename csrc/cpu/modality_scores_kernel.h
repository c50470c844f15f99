// Scores of rows whose classes adjoin in memory; no include guard, see foreach_simd.h.

// clang-format off
#include "cpu/simd/targets.h"
#include "cpu/simd/long_sum.h"
#include "cpu/simd/exp_row.h"
#include "cpu/simd/score_columns.h"
// clang-format on

// A row's place, found by one division at the first row of a part: one for each row takes longer
// than reading six classes.
struct RowPlace {
  int64_t outer;
  int64_t inner;
  int64_t end;

  explicit RowPlace(const LogitRows& rows)
      : outer(rows.begin / rows.inner), inner(rows.begin - outer * rows.inner), end(rows.inner) {}

  int64_t in(const RowStrides& strides) const {
    return outer * strides.outer + inner * strides.inner;
  }

  void advance() {
    if (++inner == end) {
      inner = 0;
      ++outer;
    }
  }
};

// A vector of one row's targets, as shares of its score.
template <typename scalar_t>
class ScoreRow {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  static constexpr int kWidth = lanes_of<scalar_t>;
  template <bool kMany>
  using Sum = std::conditional_t<kMany, LongSum<vec_t>, ShortSum<vec_t>>;

 public:
  // A run of classes.
  static constexpr int64_t kChunk = kRun * kWidth;

  ScoreRow(const LogitRows& rows, const RowPlace& place) : rows_(rows) {
    x_ = static_cast<const scalar_t*>(rows.logits) + place.in(rows.strides);
    target_ = place.in(rows.target_strides);
  }

  // f(class, n, targets, weights) for vectors of n classes; the shares of those beyond are 0. A run
  // of the sums that f adds to is a chunk.
  template <typename F, typename... Sums>
  void for_each_vector(const F& f, Sums&... sums) const {
    acc_t targets[kChunk];
    const acc_t* weights = rows_.weight.as(acc_t());
    for (int64_t first = 0; first < rows_.classes; first += kChunk) {
      if (first > 0) (sums.end_run(), ...);
      const int64_t n = std::min(kChunk, rows_.classes - first);
      const int64_t stride = rows_.target_strides.klass;
      read_targets(rows_, target_ + first * stride, stride, n, targets);
      for (int64_t j = 0; j < n; j += kWidth) {
        f(first + j, n - j, load(targets + j), weights_at(weights, first + j));
      }
    }
  }

  vec_t logits(int64_t c, int64_t n, acc_t rest) const { return load_some(x_ + c, n, rest); }

  // f(class, n, share, likelihood)
  template <typename F, typename... Sums>
  void for_each_label(const F& f, Sums&... sums) const {
    const acc_t* pos_weights = rows_.pos_weight.as(acc_t());
    const auto of_vector = [&](int64_t c, int64_t n, vec_t y, vec_t weight) {
      const vec_t share = label_share(y, weight, weights_at(pos_weights, c));
      f(c, n, first_lanes(share, n), likelihood(logits(c, n, 0), y));
    };
    for_each_vector(of_vector, sums...);
  }

  template <bool kMany>
  void label_scores(const RowScores& out, int64_t i) const {
    Sum<kMany> prob, log_prob, shares;
    const auto add = [&](int64_t, int64_t, vec_t a, const Likelihood<vec_t>& label) {
      prob.add(a * label.prob);
      log_prob.add(shared(a, label.log_prob));
      shares.add(a);
    };
    for_each_label(add, prob, log_prob, shares);
    const double all = shares.total();
    put_scores(out, i, prob.total() / all, log_prob.total() / all, 1);
  }

  template <bool kMany>
  void share_scores(const RowScores& out, int64_t i) const {
    const acc_t max = row_max(x_, rows_.classes);
    Sum<kMany> sum, prob, log_prob, shares;
    const auto add = [&](int64_t c, int64_t n, vec_t t, vec_t weight) {
      const vec_t a = first_lanes(weight, n) * t;
      const vec_t below = logits(c, n, -std::numeric_limits<acc_t>::infinity()) - max;
      const vec_t e = exp_nonpositive(below);
      sum.add(e);
      prob.add(a * e);
      log_prob.add(shared(a, below));
      shares.add(a);
    };
    for_each_vector(add, sum, prob, log_prob, shares);
    const double whole = sum.total(), all = shares.total();
    put_scores(out, i, prob.total() / whole / all, log_prob.total() / all - std::log(whole), all);
  }

  template <bool kMany>
  void label_grads(const RowGrads& grads, scalar_t* out) const {
    Sum<kMany> shares;
    for_each_label([&](int64_t, int64_t, vec_t a, const Likelihood<vec_t>&) { shares.add(a); },
                   shares);
    const vec_t part = splat(static_cast<acc_t>(1 / shares.total()));
    const vec_t grad_prob = splat(static_cast<acc_t>(grads.grad_prob));
    const vec_t grad_log_prob = splat(static_cast<acc_t>(grads.grad_log_prob));
    for_each_label([&](int64_t c, int64_t n, vec_t a, const Likelihood<vec_t>& label) {
      const vec_t slope = grad_prob * label.prob + grad_log_prob;
      store_some(out + c, n, shared(a * part, slope * label.slope));
    });
  }

  template <bool kMany>
  void share_grads(const RowGrads& grads, scalar_t* out) const {
    acc_t* terms = static_cast<acc_t*>(grads.terms);
    acc_t* shares = terms + rows_.classes + kTermsPadding;
    const acc_t max = row_max(x_, rows_.classes);
    Sum<kMany> sum, prob, share;
    const auto add = [&](int64_t c, int64_t n, vec_t t, vec_t weight) {
      const vec_t a = first_lanes(weight, n) * t;
      const vec_t e = exp_nonpositive(logits(c, n, -std::numeric_limits<acc_t>::infinity()) - max);
      store(terms + c, e);
      store(shares + c, a);
      sum.add(e);
      prob.add(a * e);
      share.add(a);
    };
    for_each_vector(add, sum, prob, share);
    const double whole = sum.total(), all = share.total();
    const double slope = grads.grad_prob * prob.total() / whole + grads.grad_log_prob * all;
    const vec_t common = splat(static_cast<acc_t>(-slope / whole));
    const vec_t own = splat(static_cast<acc_t>(grads.grad_prob / whole));
    const vec_t grad_log_prob = splat(static_cast<acc_t>(grads.grad_log_prob));
    for (int64_t c = 0; c < rows_.classes; c += kWidth) {
      const vec_t e = load(terms + c);
      const vec_t grad = common * e + load(shares + c) * (own * e + grad_log_prob);
      store_some(out + c, rows_.classes - c, all == 0 ? vec_t{} : grad);
    }
  }

  // Scores of the true class, as they were before there were other targets: to the bit.
  void index_scores(const RowScores& out, int64_t i, int64_t label) const {
    const double weight = index_weight(rows_, label);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (weight == 0 || label < 0 || label >= rows_.classes) {
      put_scores(out, i, nan, nan, weight);
      return;
    }
    const acc_t max = row_max(x_, rows_.classes);
    const acc_t sum = exp_row<false>(x_, rows_.classes, max, static_cast<acc_t*>(nullptr));
    const acc_t below_max = Element<scalar_t>::widen(x_[label]) - max;
    put_scores(out, i, std::exp(below_max) / sum, below_max - std::log(sum), weight);
  }

  // Does as index_scores, and forms the row's statistics from the same vectors.
  void index_statistics(const RowStatistics& out, int64_t i, int64_t label) const {
    const double weight = index_weight(rows_, label);
    const bool possible = label >= 0 && label < rows_.classes;
    const acc_t nan = std::numeric_limits<acc_t>::quiet_NaN();
    const acc_t inf = std::numeric_limits<acc_t>::infinity();
    if (weight == 0) {
      put_scores(out.scores, i, 0, 0, weight);
      put_statistics(out, i, false, 0, 0, 0);
      return;
    }
    const acc_t max = row_max(x_, rows_.classes);
    const acc_t own = possible ? Element<scalar_t>::widen(x_[label]) : nan;
    LongSum<vec_t> sum, below_sum, abs_sum;
    for (int64_t c = 0; c < rows_.classes;) {
      if (c > 0) (sum.end_run(), below_sum.end_run(), abs_sum.end_run());
      for (const int64_t end = std::min(rows_.classes, c + kChunk); c < end; c += kWidth) {
        const vec_t x = logits(c, rows_.classes - c, -inf);
        const vec_t below = x - max;
        const vec_t e = exp_nonpositive(below);
        sum.add(e);
        below_sum.add(shared(e, below));
        abs_sum.add(first_lanes(x < 0 ? -x : x, rows_.classes - c));
      }
    }
    const double total = sum.total(), log_sum = std::log(total);
    const acc_t below_max = own - max;
    put_scores(out.scores, i, std::exp(below_max) / total, below_max - log_sum, weight);
    put_statistics(out, i, own == max && total == total && first_of_largest(own, label),
                   log_sum - below_sum.total() / total, max + log_sum, abs_sum.total());
  }

  void index_grads(const RowGrads& grads, int64_t label, scalar_t* out) const {
    acc_t* terms = static_cast<acc_t*>(grads.terms);
    const int64_t classes = rows_.classes;
    const double weight = index_weight(rows_, label);
    if (weight == 0 || label < 0 || label >= classes) {
      const acc_t fill = weight == 0 ? acc_t(0) : std::numeric_limits<acc_t>::quiet_NaN();
      for (int64_t c = 0; c < classes; c += kWidth) store_some(out + c, classes - c, splat(fill));
      return;
    }
    store(terms + classes, vec_t{});  // for the last vector, which is stored in part
    const acc_t sum = exp_row<true>(x_, classes, row_max(x_, classes), terms);
    const double slope = grads.grad_prob * (terms[label] / sum) + grads.grad_log_prob;
    const auto factor = splat(static_cast<acc_t>(-slope * weight / sum));
    terms[label] -= sum;
    for (int64_t c = 0; c < classes; c += kWidth) {
      store_some(out + c, classes - c, factor * load(terms + c));
    }
  }

 private:
  bool first_of_largest(acc_t own, int64_t label) const {
    for (int64_t c = 0; c < label; ++c) {
      if (Element<scalar_t>::widen(x_[c]) == own) return false;
    }
    return true;
  }

  const LogitRows& rows_;
  const scalar_t* x_;
  int64_t target_;
};

// f(rows as columns)
template <typename F>
inline void visit_columns(const LogitRows& rows, const F& f) {
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (rows.classes > kRun) {
      f(ScoreColumns<scalar_t, true>(rows));
    } else {
      f(ScoreColumns<scalar_t, false>(rows));
    }
  });
}

inline void score_columns(const LogitRows& rows, const RowScores& out) {
  visit_columns(rows, [&](auto&& columns) { columns.scores(out); });
}

inline void statistics_columns(const LogitRows& rows, const RowStatistics& out) {
  visit_columns(rows, [&](auto&& columns) { columns.statistics(out); });
}

inline void grad_columns(const LogitRows& rows, const RowGrads& grads) {
  visit_columns(rows, [&](auto&& columns) { columns.grads(grads); });
}

inline void score_rows(const LogitRows& rows, const RowScores& out) {
  if (better_as_columns(rows)) return score_columns(rows, out);
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    RowPlace place(rows);
    const bool many = rows.classes > ScoreRow<scalar_t>::kChunk;
    for (int64_t row = rows.begin; row < rows.end; ++row, place.advance()) {
      const ScoreRow<scalar_t> one(rows, place);
      const int64_t i = row - rows.begin;
      if (rows.kind == TargetKind::kIndices) {
        one.index_scores(out, i, rows.labels[row]);
      } else if (rows.kind == TargetKind::kShares) {
        many ? one.template share_scores<true>(out, i) : one.template share_scores<false>(out, i);
      } else {
        many ? one.template label_scores<true>(out, i) : one.template label_scores<false>(out, i);
      }
    }
  });
}

inline void statistics_rows(const LogitRows& rows, const RowStatistics& out) {
  if (better_as_columns(rows)) return statistics_columns(rows, out);
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    RowPlace place(rows);
    for (int64_t row = rows.begin; row < rows.end; ++row, place.advance()) {
      ScoreRow<scalar_t>(rows, place).index_statistics(out, row - rows.begin, rows.labels[row]);
    }
  });
}

inline void grad_rows(const LogitRows& rows, const RowGrads& grads) {
  visit_dtype(rows.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    RowPlace place(rows);
    const bool many = rows.classes > ScoreRow<scalar_t>::kChunk;
    for (int64_t row = rows.begin; row < rows.end; ++row, place.advance()) {
      const ScoreRow<scalar_t> one(rows, place);
      scalar_t* out = static_cast<scalar_t*>(grads.grad_logits) + place.in(grads.strides);
      if (rows.kind == TargetKind::kIndices) {
        one.index_grads(grads, rows.labels[row], out);
      } else if (rows.kind == TargetKind::kShares) {
        many ? one.template share_grads<true>(grads, out)
             : one.template share_grads<false>(grads, out);
      } else {
        many ? one.template label_grads<true>(grads, out)
             : one.template label_grads<false>(grads, out);
      }
    }
  });
}
