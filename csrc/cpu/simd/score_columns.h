// Scores of rows that adjoin in memory while their classes do not, or that have few classes; no
// include guard, see foreach_simd.h.
//
// A vector holds as many rows. The logits of some classes of a tile of rows go through L1, so that
// each is read from memory once, though a maximum comes before its exponentials.

constexpr int64_t kColumnElements = 6144;
static_assert(kColumnElements / (kRun + 1) / 64 * 64 <= kLongColumns);

// `kMany`: there are more classes than a run has.
template <typename scalar_t, bool kMany>
class ScoreColumns {
  using acc_t = acc_type<scalar_t>;
  using vec_t = vec_type<scalar_t>;
  static constexpr int kWidth = lanes_of<scalar_t>;
  static constexpr int64_t kColumns = kColumnRoom<kMany>;
  using sums_t = ColumnSums<acc_t, kMany>;

 public:
  explicit ScoreColumns(const LogitRows& rows)
      : rows_(rows), x_(static_cast<const scalar_t*>(rows.logits)) {
    const int64_t fit = kColumnElements / rows.classes / 64 * 64;
    tile_ = std::clamp<int64_t>(fit, 64, kMany ? kLongColumns : kMaxColumns);
    step_ = kColumnElements / tile_;
  }

  void scores(const RowScores& out) {
    for_each_tile([&](int64_t row, int64_t n) {
      rows_.kind == TargetKind::kLabels ? sum_labels(n) : sum_kind<false>(row, n);
      finish(row, n);
      for (int64_t j = 0; j < n; ++j) {
        put_scores(out, row - rows_.begin + j, prob_[j], log_prob_[j], weight_[j]);
      }
    });
  }

  // The statistics for class indices.
  void statistics(const RowStatistics& out) {
    for_each_tile([&](int64_t row, int64_t n) {
      sum_statistics(row, n);
      finish(row, n);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t i = row - rows_.begin + j;
        put_scores(out.scores, i, prob_[j], log_prob_[j], weight_[j]);
        // Without a class that can be, softmax is 0 / 0.
        const bool defined = sum_[j] > 0;
        const double sum = defined ? sum_[j] : std::numeric_limits<double>::quiet_NaN();
        const bool correct = defined && lead_[j] == rows_.labels[row + j];
        const double log_sum = std::log(sum);
        put_statistics(out, i, correct, log_sum - below_[j] / sum, top_[j] + log_sum, abs_[j]);
      }
    });
  }

  void grads(const RowGrads& grads) {
    for_each_tile([&](int64_t row, int64_t n) {
      scalar_t* out = static_cast<scalar_t*>(grads.grad_logits) + place(grads.strides);
      if (rows_.kind == TargetKind::kLabels) {
        sum_labels(n);
        label_grads(n, grads, out);
      } else {
        sum_kind<true>(row, n);
        finish(row, n);
        class_grads(row, n, grads, out);
      }
    });
  }

 private:
  // f(row, n) for tiles of n rows, all of one outer.
  template <typename F>
  void for_each_tile(const F& f) {
    for (int64_t row = rows_.begin; row < rows_.end;) {
      outer_ = row / rows_.inner;
      inner_ = row - outer_ * rows_.inner;
      const int64_t n = std::min({tile_, rows_.inner - inner_, rows_.end - row});
      f(row, n);
      row += n;
    }
  }

  int64_t place(const RowStrides& strides) const {
    return outer_ * strides.outer + inner_ * strides.inner;
  }

  const scalar_t* column(int64_t c) const {
    return x_ + place(rows_.strides) + c * rows_.strides.klass;
  }

  void read(int64_t c, int64_t n) {
    const RowStrides& strides = rows_.target_strides;
    read_targets(rows_, place(strides) + c * strides.klass, strides.inner, n, targets_);
  }

  // The logits of `k` classes into terms_, their maxima into top_.
  void read_terms(int64_t first, int64_t k, int64_t n) {
    if (rows_.classes_adjoin) transpose(first, k, n);
    for (int64_t c = 0; c < k; ++c) {
      const scalar_t* x = column(first + c);
      acc_t* terms = terms_ + c * tile_;
      for (int64_t j = 0; j < n; j += kWidth) {
        const vec_t v =
            rows_.classes_adjoin ? load(terms + j) : load_some(x + j, n - j, -kInfinity);
        store(terms + j, v);
        store(top_ + j, maximum(v, load(top_ + j)));
      }
    }
  }

  // The logits of rows whose classes adjoin, into terms_.
  void transpose(int64_t first, int64_t k, int64_t n) {
    const scalar_t* x = column(first);
    for (int64_t j = 0; j < n; ++j, x += rows_.strides.inner) {
      for (int64_t c = 0; c < k; ++c) terms_[c * tile_ + j] = Element<scalar_t>::widen(x[c]);
    }
    for (int64_t j = n; j % kWidth != 0; ++j) {
      for (int64_t c = 0; c < k; ++c) terms_[c * tile_ + j] = -kInfinity;
    }
  }

  // Turns what has been summed to the new maxima; a logit that was picked has no share.
  void rescale(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) {
      const vec_t top = load(top_ + j), old = load(shift_ + j);
      const vec_t shift = top == -kInfinity ? vec_t{} : top;
      const vec_t sum = load(sum_ + j), share = load(share_ + j);
      // Before the first class the shift is 0 and the sum nothing.
      const vec_t lower = sum == 0 ? vec_t{} : old - shift;
      const vec_t factor = exp_nonpositive(lower);
      store(sum_ + j, sum * factor);
      store(prob_ + j, load(prob_ + j) * factor);
      sum_.scale_low(j, factor);
      prob_.scale_low(j, factor);
      store(log_prob_ + j, load(log_prob_ + j) + shared(share, old - shift));
      store(shift_ + j, shift);
    }
  }

  template <bool kStore>
  void sum_kind(int64_t row, int64_t n) {
    const bool shares = rows_.kind == TargetKind::kShares;
    shares ? sum_classes<kStore, true>(row, n) : sum_classes<kStore, false>(row, n);
  }

  // e^(x - max) and its sums; kStore keeps the exponentials in terms_.
  template <bool kStore, bool kShares>
  void sum_classes(int64_t row, int64_t n) {
    const acc_t* weights = rows_.weight.as(acc_t());
    begin(n, sum_, prob_, log_prob_, share_);
    for (int64_t first = 0; first < rows_.classes; first += step_) {
      const int64_t k = std::min(step_, rows_.classes - first);
      read_terms(first, k, n);
      if constexpr (!kShares) pick(row, first, k, n);
      rescale(n);
      for (int64_t c = 0; c < k;) {
        acc_t* const sum = sum_.begin_run(n);
        acc_t* const prob = kShares ? prob_.begin_run(n) : nullptr;
        acc_t* const log_prob = kShares ? log_prob_.begin_run(n) : nullptr;
        acc_t* const share = kShares ? share_.begin_run(n) : nullptr;
        for (const int64_t end = std::min(k, c + kRun); c < end; ++c) {
          acc_t* terms = terms_ + c * tile_;
          if constexpr (kShares) read(first + c, n);
          const vec_t weight = weight_of(weights, first + c);
          for (int64_t j = 0; j < n; j += kWidth) {
            const vec_t below = load(terms + j) - load(shift_ + j);
            const vec_t e = exp_nonpositive(below);
            if constexpr (kStore) store(terms + j, e);
            store(sum + j, load(sum + j) + e);
            if constexpr (!kShares) continue;
            const vec_t a = weight * load(targets_ + j);
            store(prob + j, load(prob + j) + a * e);
            store(log_prob + j, load(log_prob + j) + shared(a, below));
            store(share + j, load(share + j) + a);
          }
        }
        sum_.end_run(n);
        if constexpr (kShares) end_runs(n, prob_, log_prob_, share_);
      }
    }
    sum_.close(n);
    if constexpr (kShares) close_sums(n, prob_, log_prob_, share_);
  }

  // Before the first class.
  template <typename... Sums>
  void begin(int64_t n, Sums&... sums) {
    for (int64_t j = 0; j < n; j += kWidth) {
      store(top_ + j, splat(-kInfinity));
      store(shift_ + j, vec_t{});
      (sums.clear(j), ...);
    }
  }

  // Does as sum_classes<false, false>, with all that statistics are made of.
  void sum_statistics(int64_t row, int64_t n) {
    begin(n, sum_, prob_, log_prob_, share_, below_, abs_);
    std::fill_n(lead_, n, 0);
    for (int64_t first = 0; first < rows_.classes; first += step_) {
      const int64_t k = std::min(step_, rows_.classes - first);
      for (int64_t j = 0; j < n; ++j) used_[j] = top_[j];
      read_terms(first, k, n);
      find_lead(first, k, n);
      pick(row, first, k, n);
      lower(n);
      rescale(n);
      for (int64_t c = 0; c < k;) {
        acc_t* const sum = sum_.begin_run(n);
        acc_t* const lower = below_.begin_run(n);
        acc_t* const size = abs_.begin_run(n);
        for (const int64_t end = std::min(k, c + kRun); c < end; ++c) {
          const acc_t* terms = terms_ + c * tile_;
          for (int64_t j = 0; j < n; j += kWidth) {
            const vec_t x = load(terms + j);
            const vec_t below = x - load(shift_ + j);
            const vec_t e = exp_nonpositive(below);
            store(sum + j, load(sum + j) + e);
            store(lower + j, load(lower + j) + shared(e, below));
            store(size + j, load(size + j) + (x < 0 ? -x : x));
          }
        }
        end_runs(n, sum_, below_, abs_);
      }
    }
    close_sums(n, sum_, below_, abs_);
  }

  // The first class that has the new maximum, where it is more than the old one, in used_.
  void find_lead(int64_t first, int64_t k, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      if (!(top_[j] > used_[j])) continue;
      int64_t c = 0;
      while (c < k - 1 && terms_[c * tile_ + j] != top_[j]) ++c;
      lead_[j] = first + c;
    }
  }

  // Turns the sum of e^(x - shift) (x - shift) to the new maxima; `rescale` follows.
  void lower(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) {
      const vec_t top = load(top_ + j), sum = load(sum_ + j);
      const vec_t shift = top == -kInfinity ? vec_t{} : top;
      const vec_t less = sum == 0 ? vec_t{} : load(shift_ + j) - shift;
      const vec_t factor = exp_nonpositive(less);
      store(below_ + j, shared(factor, load(below_ + j) + less * sum));
      below_.scale_low(j, factor);
    }
  }

  // The true classes' logits, as they are.
  void pick(int64_t row, int64_t first, int64_t k, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t c = rows_.labels[row + j] - first;
      if (c >= 0 && c < k) log_prob_[j] = terms_[c * tile_ + j];
    }
  }

  void sum_labels(int64_t n) {
    begin(n, prob_, log_prob_, share_);
    for (int64_t first = 0; first < rows_.classes; first += kRun) {
      acc_t* const prob = prob_.begin_run(n);
      acc_t* const log_prob = log_prob_.begin_run(n);
      acc_t* const share = share_.begin_run(n);
      const auto add = [=](int64_t, int64_t j, vec_t a, const Likelihood<vec_t>& label) {
        store(prob + j, load(prob + j) + a * label.prob);
        store(log_prob + j, load(log_prob + j) + shared(a, label.log_prob));
        store(share + j, load(share + j) + a);
      };
      for_each_label(first, std::min(rows_.classes, first + kRun), n, add);
      end_runs(n, prob_, log_prob_, share_);
    }
    close_sums(n, prob_, log_prob_, share_);
  }

  // f(class, j, share, likelihood) for vectors of these labels.
  template <typename F>
  void for_each_label(int64_t first, int64_t end, int64_t n, const F& f) {
    for (int64_t c = first; c < end; ++c) {
      read(c, n);
      const vec_t weight = weight_of(rows_.weight.as(acc_t()), c);
      const vec_t pos_weight = weight_of(rows_.pos_weight.as(acc_t()), c);
      for (int64_t j = 0; j < n; j += kWidth) {
        const vec_t z = load_some(column(c) + j, n - j, 0), y = load(targets_ + j);
        f(c, j, label_share(y, weight, pos_weight), likelihood(z, y));
      }
    }
  }

  // Turns sums into scores.
  void finish(int64_t row, int64_t n) {
    const vec_t nan = splat(std::numeric_limits<acc_t>::quiet_NaN());
    for (int64_t j = 0; j < n; j += kWidth) {
      const vec_t prob = load(prob_ + j), log_prob = load(log_prob_ + j), share = load(share_ + j);
      if (rows_.kind == TargetKind::kLabels) {
        store(prob_ + j, prob / share);
        store(log_prob_ + j, log_prob / share);
        continue;
      }
      const vec_t sum = load(sum_ + j);
      const vec_t log_sum = load(top_ + j) == -kInfinity ? nan : log_of_normal(sum);
      if (rows_.kind == TargetKind::kShares) {
        store(prob_ + j, prob / sum / share);
        store(log_prob_ + j, log_prob / share - log_sum);
      } else {
        const vec_t below = log_prob - load(shift_ + j);
        store(prob_ + j, exp_nonpositive(below) / sum);
        store(log_prob_ + j, below - log_sum);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      if (rows_.kind != TargetKind::kIndices) {
        weight_[j] = rows_.kind == TargetKind::kShares ? share_[j] : 1.0;
        continue;
      }
      const int64_t label = rows_.labels[row + j];
      weight_[j] = index_weight(rows_, label);
      if (label < 0 || label >= rows_.classes) {
        prob_[j] = log_prob_[j] = std::numeric_limits<acc_t>::quiet_NaN();
      }
    }
  }

  void label_grads(int64_t n, const RowGrads& grads, scalar_t* out) {
    const vec_t grad_prob = splat(static_cast<acc_t>(grads.grad_prob));
    const vec_t grad_log_prob = splat(static_cast<acc_t>(grads.grad_log_prob));
    const auto write = [&](int64_t c, int64_t j, vec_t a, const Likelihood<vec_t>& label) {
      const vec_t slope = grad_prob * label.prob + grad_log_prob;
      store_some(out + c * grads.strides.klass + j, n - j,
                 shared(a / load(share_ + j), slope * label.slope));
    };
    for_each_label(0, rows_.classes, n, write);
  }

  void class_grads(int64_t row, int64_t n, const RowGrads& grads, scalar_t* out) {
    const bool shares = rows_.kind == TargetKind::kShares;
    const acc_t* weights = rows_.weight.as(acc_t());
    const vec_t grad_log_prob = splat(static_cast<acc_t>(grads.grad_log_prob));
    // top_ becomes what is the same for all classes of a row, log_prob_ what goes with e a.
    for (int64_t j = 0; j < n; ++j) {
      const double slope = grads.grad_prob * prob_[j] + grads.grad_log_prob;
      top_[j] = static_cast<acc_t>(-slope * weight_[j] / sum_[j]);
      log_prob_[j] = static_cast<acc_t>(grads.grad_prob / sum_[j]);
      used_[j] = weight_[j] == 0 ? 0 : 1;
    }
    for (int64_t j = n; j % kWidth != 0; ++j) used_[j] = 0;
    for (int64_t first = 0; first < rows_.classes; first += step_) {
      const int64_t k = std::min(step_, rows_.classes - first);
      if (step_ < rows_.classes) exponentials(first, k, n);
      for (int64_t j = 0; j < n && !shares; ++j) {
        const int64_t c = rows_.labels[row + j] - first;
        if (c >= 0 && c < k) terms_[c * tile_ + j] -= sum_[j];
      }
      for (int64_t c = 0; c < k; ++c) {
        if (shares) read(first + c, n);
        const vec_t weight = weight_of(weights, first + c);
        for (int64_t j = 0; j < n; j += kWidth) {
          const vec_t e = load(terms_ + c * tile_ + j);
          vec_t grad = load(top_ + j) * e;
          if (shares) {
            const vec_t a = weight * load(targets_ + j);
            grad += a * (load(log_prob_ + j) * e + grad_log_prob);
          }
          const vec_t used = load(used_ + j);
          store_some(out + (first + c) * grads.strides.klass + j, n - j,
                     used == 0 ? vec_t{} : grad);
        }
      }
    }
  }

  // Once more, where L1 has not held them all.
  void exponentials(int64_t first, int64_t k, int64_t n) {
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t j = 0; j < n; j += kWidth) {
        const vec_t below = load_some(column(first + c) + j, n - j, 0) - load(shift_ + j);
        store(terms_ + c * tile_ + j, exp_nonpositive(below));
      }
    }
  }

  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  const LogitRows& rows_;
  const scalar_t* x_;
  int64_t tile_, step_, outer_ = 0, inner_ = 0;
  alignas(kVectorBytes) acc_t terms_[kColumnElements];
  acc_t targets_[kColumns];
  acc_t top_[kColumns];    // the largest logit
  acc_t shift_[kColumns];  // the same, 0 for -inf
  sums_t sum_;             // of e^(x - shift)
  sums_t share_;           // of the targets' shares
  sums_t prob_;            // of shares times exponentials; then the score
  sums_t log_prob_;        // of shares times x - shift, or the true logit; then the score
  acc_t used_[kColumns];
  sums_t below_;  // of e^(x - shift) times x - shift
  sums_t abs_;    // of |x|
  int64_t lead_[kColumns];
  double weight_[kColumns];
};
