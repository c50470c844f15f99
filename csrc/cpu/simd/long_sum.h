// Sums of many terms: each run of them is summed by itself, and what rounding takes from the sum of
// the runs is kept; no include guard, see foreach_simd.h.

// So few terms that the rounding of a run does not show beside that of a term.
constexpr int64_t kRun = 32;

// Adds b to `sum`, and what rounding takes from that to `low`; an infinity leaves nothing.
template <typename vec_t>
inline void add_exactly(vec_t b, vec_t& sum, vec_t& low) {
  const vec_t a = sum;
  sum = a + b;
  const vec_t grown = sum - a;
  const vec_t rest = (a - (sum - grown)) + (b - grown);
  low += rest == rest ? rest : vec_t{};
}

// The sum of vectors, of which there is one run.
template <typename vec_t>
class ShortSum {
 public:
  void add(vec_t x) { sum_ += x; }
  void end_run() {}
  double total() const { return sum_lanes(sum_); }

 private:
  vec_t sum_{};
};

// The same of any number of runs; of one it is what a plain sum would be.
template <typename vec_t>
class LongSum {
 public:
  void add(vec_t x) { run_ += x; }

  void end_run() {
    add_exactly(run_, sum_, low_);
    run_ = vec_t{};
    long_ = true;
  }

  double total() const {
    return long_ ? sum_lanes(sum_) + sum_lanes(run_ + low_) : sum_lanes(run_);
  }

 private:
  vec_t run_{}, sum_{}, low_{};
  bool long_ = false;
};

constexpr int64_t kMaxColumns = 512;
// As many columns at most have more than a run of terms.
constexpr int64_t kLongColumns = 128;

// Elements of an array for columns: no two that are gone through together are a multiple of 4096
// bytes apart, or a load would wait for a store that it has nothing to do with.
template <bool kMany>
constexpr int64_t kColumnRoom = kMany ? kLongColumns : kMaxColumns + 128;

// A sum for each of n columns, which are side by side; `kMany`: of more than one run.
template <typename acc_t, bool kMany>
class ColumnSums {
  using vec_t = vec_type<acc_t>;
  static constexpr int kWidth = lanes_of<acc_t>;

 public:
  operator acc_t*() { return sums_; }

  void clear(int64_t j) {
    store(sums_ + j, vec_t{});
    store(low_ + j, vec_t{});
  }

  // The place to add up the next run in.
  acc_t* begin_run(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) store(run_ + j, vec_t{});
    return run_;
  }

  void end_run(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) {
      vec_t sum = load(sums_ + j), low = load(low_ + j);
      add_exactly(load(run_ + j), sum, low);
      store(sums_ + j, sum);
      store(low_ + j, low);
    }
  }

  // Scales what has been kept of a vector, as the caller does its sum.
  void scale_low(int64_t j, vec_t factor) { store(low_ + j, load(low_ + j) * factor); }

  // After the last run.
  void close(int64_t n) {
    for (int64_t j = 0; j < n; j += kWidth) store(sums_ + j, load(sums_ + j) + load(low_ + j));
  }

 private:
  acc_t sums_[kColumnRoom<true>], run_[kColumnRoom<true>], low_[kColumnRoom<true>];
};

template <typename acc_t>
class ColumnSums<acc_t, false> {
  using vec_t = vec_type<acc_t>;

 public:
  operator acc_t*() { return sums_; }
  void clear(int64_t j) { store(sums_ + j, vec_t{}); }
  acc_t* begin_run(int64_t) { return sums_; }
  void end_run(int64_t) {}
  void scale_low(int64_t, vec_t) {}
  void close(int64_t) {}

 private:
  acc_t sums_[kColumnRoom<false>];
};

template <typename... Sums>
inline void end_runs(int64_t n, Sums&... sums) {
  (sums.end_run(n), ...);
}

template <typename... Sums>
inline void close_sums(int64_t n, Sums&... sums) {
  (sums.close(n), ...);
}
