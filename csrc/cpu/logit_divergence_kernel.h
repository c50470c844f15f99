// The divergence of two rows of logits, and its gradient; no include guard, see foreach_simd.h.

// clang-format off
#include "cpu/simd/exp.h"
#include "cpu/simd/long_sum.h"
#include "cpu/simd/exp_row.h"
#include "cpu/simd/log.h"
// clang-format on

template <typename scalar_t>
class PairRow {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  static constexpr int kWidth = lanes_of<scalar_t>;
  // Of the series of exp(-d) - 1 + d below 1, until what is left out rounds to nothing.
  static constexpr int kTerms = sizeof(acc_t) == 4 ? 11 : 18;

 public:
  PairRow(const LogitPair& pair, int64_t row)
      : a_(static_cast<const scalar_t*>(pair.first) + row * pair.first_stride),
        b_(static_cast<const scalar_t*>(pair.second) + row * pair.second_stride),
        classes_(pair.classes) {}

  // `terms` is scratch for two rows of classes + kTermsPadding.
  void divergence(DivergenceKind kind, acc_t* terms, RowDivergence& out) {
    acc_t* more = terms + classes_ + kTermsPadding;
    max_a_ = row_max(a_, classes_);
    max_b_ = row_max(b_, classes_);
    const acc_t sum_a = exp_row<true>(a_, classes_, max_a_, terms);
    const acc_t sum_b = exp_row<true>(b_, classes_, max_b_, more);
    log_a_ = std::log(sum_a);
    log_b_ = std::log(sum_b);
    const acc_t part_a = 1 / sum_a, part_b = 1 / sum_b;
    vec_t value{}, under_p{}, under_q{};
    for (int64_t c = 0; c < classes_; c += kWidth) {
      const int64_t n = classes_ - c;
      const vec_t d = log_ratio(at(a_ + c, n), at(b_ + c, n));
      const vec_t p = first_lanes(load(terms + c), n) * part_a;
      const vec_t q = first_lanes(load(more + c), n) * part_b;
      if (kind == DivergenceKind::kKl) {
        value += kl_term(p, q, d);
        continue;
      }
      const Ratio ratio(d);
      if (kind == DivergenceKind::kMixture) {
        under_p += part_of(p, ratio.log_cosh);
        under_q += part_of(q, ratio.log_cosh);
      } else {
        value += part_of((p + q) * acc_t(0.5), ratio.js());
        under_p += part_of(p, ratio.half(d >= 0));
        under_q += part_of(q, ratio.half(d < 0));
      }
    }
    const double p = sum_lanes(under_p), q = sum_lanes(under_q), sum = sum_lanes(value);
    out = {sum, {max_a_, max_b_, log_a_, log_b_, p, q}};
    if (kind == DivergenceKind::kKl) out.numbers[4] = sum;
    if (kind == DivergenceKind::kMixture) out.value = (p + q) / 2;
  }

  // The gradients are `weight` times the slopes.
  void gradient(DivergenceKind kind, const double* numbers, double weight, scalar_t* grad_a,
                scalar_t* grad_b) {
    max_a_ = static_cast<acc_t>(numbers[0]);
    max_b_ = static_cast<acc_t>(numbers[1]);
    log_a_ = static_cast<acc_t>(numbers[2]);
    log_b_ = static_cast<acc_t>(numbers[3]);
    const acc_t under_p = static_cast<acc_t>(numbers[4]), under_q = static_cast<acc_t>(numbers[5]);
    const acc_t w = static_cast<acc_t>(weight);
    for (int64_t c = 0; c < classes_; c += kWidth) {
      const int64_t n = classes_ - c;
      const vec_t a = at(a_ + c, n), b = at(b_ + c, n);
      const vec_t p = exp_nonpositive(a - max_a_ - log_a_);
      const vec_t q = exp_nonpositive(b - max_b_ - log_b_);
      const vec_t d = log_ratio(a, b);
      vec_t to_a, to_b;
      if (kind == DivergenceKind::kKl) {
        to_a = part_of(p, d - under_p);
        to_b = q - p;
      } else {
        const Ratio ratio(d);
        if (kind == DivergenceKind::kMixture) {
          const vec_t quarter = (p - q) * acc_t(0.25);
          to_a = part_of(p, ratio.log_cosh - under_p) * acc_t(0.5) + quarter;
          to_b = part_of(q, ratio.log_cosh - under_q) * acc_t(0.5) - quarter;
        } else {
          to_a = part_of(p, ratio.half(d >= 0) - under_p);
          to_b = part_of(q, ratio.half(d < 0) - under_q);
        }
      }
      if (grad_a != nullptr) put(grad_a + c, n, to_a * w);
      if (grad_b != nullptr) put(grad_b + c, n, to_b * w);
    }
  }

 private:
  // The parts of the terms that depend on d = ln p - ln q, besides its sign.
  struct Ratio {
    explicit Ratio(vec_t d) : size(d < 0 ? -d : d), e(exp_nonpositive(-size)), near(size < 1) {
      const vec_t zero{}, one = zero + 1;
      const vec_t sinh_sq = (one - e) * (one - e) / (4 * e);
      const vec_t r = log_of_one_more(near ? sinh_sq : e);
      const vec_t x = size * acc_t(0.5), far = splat(kLog2) - r;
      log_cosh = near ? r * acc_t(0.5) : x - far;
      nearer = near ? x - log_cosh : far;
    }

    vec_t js() const {
      const vec_t zero{}, one = zero + 1;
      const vec_t close = size * acc_t(0.5) * ((one - e) / (one + e)) - log_cosh;
      return near ? close : nearer - part_of(e, size) / (one + e);
    }

    // Half of ln(p / m) where p is the larger one, else of the smaller one.
    template <typename mask_t>
    vec_t half(mask_t larger) const {
      return (larger ? nearer : nearer - size) * acc_t(0.5);
    }

    vec_t size, e;
    decltype(vec_t{} < vec_t{}) near;
    vec_t log_cosh;  // ln cosh(d / 2)
    vec_t nearer;    // ln(max(p, q) / m)
  };

  // ln(1 + x) for 0 <= x < 1.
  static vec_t log_of_one_more(vec_t x) {
    const vec_t zero{}, one = zero + 1;
    const vec_t u = one + x;
    // x - (u - 1) is the part of x that 1 + x has rounded away.
    return log_of_normal(u) + (x - (u - one));
  }

  // a * x, and 0 for a share of nothing, whatever x is.
  static vec_t part_of(vec_t a, vec_t x) { return a == 0 ? vec_t{} : a * x; }

  static vec_t kl_term(vec_t p, vec_t q, vec_t d) {
    vec_t series = splat(acc_t(1));
    MMFUSE_UNROLL for (int n = kTerms; n > 2; --n) {
      series = multiply_add(series * d, splat(acc_t(-1.0 / n)), splat(acc_t(1)));
    }
    const vec_t near = p * (d * d * acc_t(0.5) * series);
    return (d < 1) & (d > -1) ? near : part_of(p, d) - p + q;
  }

  vec_t log_ratio(vec_t a, vec_t b) const {
    return (a - max_a_) - (b - max_b_) - (log_a_ - log_b_);
  }

  static vec_t at(const scalar_t* x, int64_t n) {
    return n >= kWidth ? load(x) : load_first(x, n, 0);
  }

  static void put(scalar_t* out, int64_t n, vec_t x) {
    n >= kWidth ? store(out, x) : store_first(out, n, x);
  }

  static constexpr acc_t kLog2 = acc_t(0.693147180559945309);
  const scalar_t* a_;
  const scalar_t* b_;
  int64_t classes_;
  acc_t max_a_ = 0, max_b_ = 0, log_a_ = 0, log_b_ = 0;
};

inline void divergence_rows(const LogitPair& pair, DivergenceKind kind, int64_t begin, int64_t end,
                            void* terms, RowDivergence* out) {
  visit_dtype(pair.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      PairRow<scalar_t>(pair, row).divergence(kind, static_cast<acc_type<scalar_t>*>(terms),
                                              out[row - begin]);
    }
  });
}

// `numbers` and `weights` are of the rows from `begin` on.
inline void divergence_grad_rows(const LogitPair& pair, DivergenceKind kind, int64_t begin,
                                 int64_t end, const double (*numbers)[kRowNumbers],
                                 const double* weights, const PairGrads& grads) {
  visit_dtype(pair.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    const auto row_of = [&](void* grad, int64_t row) {
      return grad == nullptr ? nullptr : static_cast<scalar_t*>(grad) + row * pair.classes;
    };
    for (int64_t row = begin; row < end; ++row) {
      PairRow<scalar_t>(pair, row).gradient(kind, numbers[row - begin], weights[row - begin],
                                            row_of(grads.first, row), row_of(grads.second, row));
    }
  });
}
