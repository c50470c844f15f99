#include "joint_entropies.h"

#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>

#include "glue/chunks.h"
#include "glue/tensors.h"

#define MMFUSE_KERNEL "cpu/joint_entropies_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Few enough bins to compare with every edge.
constexpr int kComparedBins = 16;
// Below this many values a piece of a row is not worth a task.
constexpr int64_t kMinPiece = 8192;
// So few values that no 32-bit count overflows.
constexpr int64_t kMaxPiece = int64_t{1} << 30;
// Copies of the histograms share L1 with the tiles.
constexpr int64_t kCopiedCells = 8192;
constexpr int kMaxCopies = 4;
constexpr int kMaxOrder = 3;
// Cells of all margins together: three planes and three lines of a cube, or two lines of a square.
constexpr int64_t kMarginCells = 3 * 32 * 32 + 3 * 32;

// Keeps the compiler from contracting the product with the sum that follows.
template <typename acc_t>
acc_t rounded(acc_t product) {
  const volatile acc_t stored = product;
  return stored;
}

template <typename acc_t>
void set_bins(const RowRange& range, RowBins* row) {
  acc_t low = static_cast<acc_t>(range.low), high = static_cast<acc_t>(range.high);
  row->valid = range.finite && std::isfinite(high - low);
  if (!row->valid) return;
  if (low == high) {
    low -= static_cast<acc_t>(0.5);
    high += static_cast<acc_t>(0.5);
  }
  const acc_t width = high - low;
  const acc_t bins = static_cast<acc_t>(row->bins);
  const acc_t step = width / bins;
  acc_t* edges = edges_of(*row, acc_t());
  for (int i = 0; i < row->bins; ++i) {
    const acc_t number = static_cast<acc_t>(i);
    edges[i] = rounded(step == 0 ? number / bins * width : number * step) + low;
  }
  edges[row->bins] = std::numeric_limits<acc_t>::infinity();
  row->low = low;
  row->step = step;
  // The rounding of the edges and of a value's place between them amounts to less than
  // 4 epsilon (|low| + width); where that is under half a step, the nearest edge is one of the two.
  const bool certain = step >= std::numeric_limits<acc_t>::min() &&
                       step >= 16 * std::numeric_limits<acc_t>::epsilon() * (std::abs(low) + width);
  row->inverse_step = row->bins > kComparedBins && certain ? 1 / step : 0;
}

// c ln c; the counts of most cells are small.
double c_log_c(int64_t count) {
  static const auto table = [] {
    std::array<double, 1024> values{};
    for (size_t c = 1; c < values.size(); ++c) values[c] = c * std::log(static_cast<double>(c));
    return values;
  }();
  if (count < static_cast<int64_t>(table.size())) return table[count];
  return static_cast<double>(count) * std::log(static_cast<double>(count));
}

double entropy(const int64_t* counts, int64_t cells, double total) {
  double sums[4]{};
  int64_t c = 0;
  for (; c + 4 <= cells; c += 4) {
    for (int u = 0; u < 4; ++u) sums[u] += c_log_c(counts[c + u]);
  }
  for (; c < cells; ++c) sums[0] += c_log_c(counts[c]);
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return std::max(0.0, std::log(total) - sum / total);
}

int64_t power(int64_t base, int exponent) {
  return exponent == 0 ? 1 : base * power(base, exponent - 1);
}

// Sums an array [outer, bins, inner] over the bins.
void sum_bins(const int64_t* in, int64_t outer, int64_t bins, int64_t inner, int64_t* out) {
  if (inner == 1) {
    for (int64_t o = 0; o < outer; ++o) {
      out[o] = std::accumulate(in + o * bins, in + (o + 1) * bins, int64_t{0});
    }
    return;
  }
  std::fill(out, out + outer * inner, 0);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t b = 0; b < bins; ++b, in += inner) {
      for (int64_t i = 0; i < inner; ++i) out[o * inner + i] += in[i];
    }
  }
}

// The entropies of all margins of one histogram of `total` values.
void write_entropies(const int64_t* counts, int order, int bins, int64_t total, double* out) {
  const int whole = (1 << order) - 1;
  if (total == 0) {
    std::fill(out, out + whole, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  int64_t buffer[kMarginCells];
  const int64_t* margins[1 << kMaxOrder];
  int64_t* next = buffer;
  margins[whole] = counts;
  for (int mask = whole; mask > 0; --mask) {
    const int kept = __builtin_popcount(mask);
    if (mask != whole) {
      // From the margin that has one variable more.
      const int added = __builtin_ctz(~mask);
      const int before = __builtin_popcount(mask & ((1 << added) - 1));
      sum_bins(margins[mask | 1 << added], power(bins, before), bins, power(bins, kept - before),
               next);
      margins[mask] = next;
      next += power(bins, kept);
    }
    out[mask - 1] = entropy(margins[mask], power(bins, kept), static_cast<double>(total));
  }
}

class JointCounter {
 public:
  JointCounter(const TensorList& data, const std::vector<int64_t>& tuples, int order, int bins,
               int64_t* counts, double* entropies)
      : dtype_(dtype_of(data[0])),
        tuples_(tuples),
        order_(order),
        bins_(bins),
        problems_(data[0].size(0)),
        length_(data[0].size(1)),
        cells_(power(bins, order)),
        counts_(counts),
        entropies_(entropies) {
    for (const Tensor& x : data) data_.push_back(static_cast<const char*>(x.const_data_ptr()));
    while (copies_ < kMaxCopies && 2 * copies_ * cells_ * count() <= kCopiedCells) copies_ *= 2;
  }

  void run() {
    const Nanoseconds cost = range_cost() + count_cost() + entropy_cost();
    const int64_t threads = threads_for(cost);
    const int64_t tasks = 4 * threads;
    if (threads > 1 && problems_ < tasks && length_ >= 2 * kMinPiece) {
      run_pieces(tasks);
      return;
    }
    const int64_t step = (problems_ + tasks - 1) / tasks;
    parallel_steps(problems_, step, cost, [&](int64_t, int64_t begin, int64_t end) {
      Scratch scratch(*this);
      std::vector<RowBins> rows(data_.size());
      for (int64_t p = begin; p < end; ++p) {
        for (size_t k = 0; k < data_.size(); ++k) {
          set_row(range_(slice(k, p, 0, length_)), &rows[k]);
        }
        for (int64_t q = 0; q < count(); ++q) clear(q, p);
        for (int64_t i = 0; i < length_; i += kMaxPiece) {
          count_piece(p, i, std::min(length_, i + kMaxPiece), rows.data(), &scratch);
          flush(p, rows.data(), &scratch);
        }
        for (int64_t q = 0; q < count(); ++q) finish(q, p, rows.data());
      }
    });
  }

 private:
  // What a task needs for itself.
  struct Scratch {
    explicit Scratch(const JointCounter& job)
        : index(job.data_.size() * kBinTile), hits(job.count() * job.copies_ * job.cells_) {}
    std::vector<int32_t> index;
    std::vector<uint32_t> hits;
  };

  // Few long problems: their rows are cut into pieces.
  void run_pieces(int64_t tasks) {
    const size_t variables = data_.size();
    const int64_t wanted = (tasks + problems_ - 1) / problems_;
    // A task also empties its histograms.
    const int64_t least = std::max(kMinPiece, 2 * cells_);
    const int64_t step = std::min(kMaxPiece, std::max(least, (length_ + wanted - 1) / wanted));
    const int64_t pieces = (length_ + step - 1) / step;
    std::vector<RowRange> ranges(problems_ * variables * pieces);
    parallel_each(static_cast<int64_t>(ranges.size()), range_cost(), [&](int64_t i) {
      const int64_t begin = i % pieces * step, row = i / pieces;
      ranges[i] =
          range_(slice(row % variables, row / variables, begin, std::min(length_, begin + step)));
    });
    std::vector<RowBins> rows(problems_ * variables);
    for (size_t r = 0; r < rows.size(); ++r) {
      RowRange range = ranges[r * pieces];
      for (int64_t i = 1; i < pieces; ++i) {
        const RowRange& other = ranges[r * pieces + i];
        range.low = std::min(range.low, other.low);
        range.high = std::max(range.high, other.high);
        range.finite &= other.finite;
      }
      set_row(range, &rows[r]);
    }
    for (int64_t p = 0; p < problems_; ++p) {
      for (int64_t q = 0; q < count(); ++q) clear(q, p);
    }
    std::mutex mutex;
    parallel_each(problems_ * pieces, count_cost(), [&](int64_t i) {
      const int64_t p = i / pieces, begin = i % pieces * step;
      const RowBins* bins = &rows[p * variables];
      Scratch scratch(*this);
      count_piece(p, begin, std::min(length_, begin + step), bins, &scratch);
      const std::lock_guard<std::mutex> lock(mutex);
      flush(p, bins, &scratch);
    });
    parallel_each(count() * problems_, entropy_cost(), [&](int64_t i) {
      const int64_t p = i % problems_;
      finish(i / problems_, p, &rows[p * variables]);
    });
  }

  Nanoseconds range_cost() const {
    return problems_ * length_ * static_cast<double>(data_.size()) * ns(wide() ? 0.08 : 0.05);
  }

  // Two bins are compared with one edge; others take a place for each value, then a count.
  Nanoseconds count_cost() const {
    if (bins_ == 2) return problems_ * length_ * count() * ns(wide() ? 0.2 : 0.07);
    const double place = static_cast<double>(data_.size()) * (wide() ? 0.5 : 0.2);
    return problems_ * length_ * ns(place + static_cast<double>(count()) * 0.2);
  }

  Nanoseconds entropy_cost() const { return problems_ * count() * cells_ * ns(1.5); }

  bool wide() const { return dtype_ == DType::kFloat64; }

  int64_t count() const { return static_cast<int64_t>(tuples_.size()) / order_; }

  RowSlice slice(int64_t variable, int64_t problem, int64_t begin, int64_t end) const {
    return {dtype_, data_[variable] + problem * length_ * element_size(dtype_), begin, end};
  }

  void set_row(const RowRange& range, RowBins* row) const {
    row->bins = bins_;
    if (dtype_ == DType::kFloat64) {
      set_bins<double>(range, row);
    } else {
      set_bins<float>(range, row);
    }
  }

  bool is_valid(int64_t tuple, const RowBins* rows) const {
    const int64_t* members = &tuples_[tuple * order_];
    return std::all_of(members, members + order_, [&](int64_t k) { return rows[k].valid; });
  }

  int64_t* counts_of(int64_t tuple, int64_t problem) const {
    return counts_ + (tuple * problems_ + problem) * cells_;
  }

  Histogram histogram(int64_t tuple, Scratch* scratch) const {
    return {scratch->hits.data() + tuple * copies_ * cells_, cells_, copies_};
  }

  void clear(int64_t tuple, int64_t problem) const {
    std::fill_n(counts_of(tuple, problem), cells_, 0);
  }

  void count_piece(int64_t problem, int64_t begin, int64_t end, const RowBins* rows,
                   Scratch* scratch) const {
    if (bins_ == 2) return count_halves(problem, begin, end, rows, scratch);
    for (int64_t at = begin; at < end; at += kBinTile) {
      const int64_t stop = std::min(end, at + kBinTile);
      for (size_t k = 0; k < data_.size(); ++k) {
        if (rows[k].valid)
          bin_(slice(k, problem, at, stop), rows[k], &scratch->index[k * kBinTile]);
      }
      for (int64_t q = 0; q < count(); ++q) {
        if (!is_valid(q, rows)) continue;
        const int32_t* index[kMaxOrder];
        for (int i = 0; i < order_; ++i) {
          index[i] = &scratch->index[tuples_[q * order_ + i] * kBinTile];
        }
        count_(index, order_, bins_, stop - at, histogram(q, scratch));
      }
    }
  }

  // Two bins need no indices.
  void count_halves(int64_t problem, int64_t begin, int64_t end, const RowBins* rows,
                    Scratch* scratch) const {
    for (int64_t q = 0; q < count(); ++q) {
      if (!is_valid(q, rows)) continue;
      RowSlice slices[kMaxOrder];
      const RowBins* bins[kMaxOrder];
      for (int i = 0; i < order_; ++i) {
        const int64_t k = tuples_[q * order_ + i];
        slices[i] = slice(k, problem, begin, end);
        bins[i] = &rows[k];
      }
      halves_(slices, bins, order_, histogram(q, scratch).hits);
    }
  }

  void flush(int64_t problem, const RowBins* rows, Scratch* scratch) const {
    for (int64_t q = 0; q < count(); ++q) {
      if (is_valid(q, rows)) flush_(histogram(q, scratch), counts_of(q, problem));
    }
  }

  void finish(int64_t tuple, int64_t problem, const RowBins* rows) const {
    double* out = entropies_ + (tuple * problems_ + problem) * ((1 << order_) - 1);
    write_entropies(counts_of(tuple, problem), order_, bins_, is_valid(tuple, rows) ? length_ : 0,
                    out);
  }

  DType dtype_;
  std::vector<const char*> data_;
  const std::vector<int64_t>& tuples_;
  int order_;
  int bins_;
  int64_t problems_;
  int64_t length_;
  int64_t cells_;
  int copies_ = 1;
  int64_t* counts_;
  double* entropies_;
  decltype(&generic::row_range) range_ = MMFUSE_SIMD_SELECT(row_range);
  decltype(&generic::bin_tile) bin_ = MMFUSE_SIMD_SELECT(bin_tile);
  decltype(&generic::count_halves) halves_ = MMFUSE_SIMD_SELECT(count_halves);
  decltype(&generic::count_tile) count_ = MMFUSE_SIMD_SELECT(count_tile);
  decltype(&generic::flush_histogram) flush_ = MMFUSE_SIMD_SELECT(flush_histogram);
};

}  // namespace

std::tuple<Tensor, Tensor> joint_entropies(const TensorList& data,
                                           const std::vector<int64_t>& tuples, int64_t order,
                                           int64_t bins) {
  STD_TORCH_CHECK(!data.empty() && data[0].numel() > 0, "mmfuse: there is nothing to count");
  check_contiguous(data, "data");
  for (const Tensor& x : data) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == data[0].size(0) && x.size(1) == data[0].size(1) &&
                        x.scalar_type() == data[0].scalar_type(),
                    "mmfuse: data must be [P, N], of one dtype and shape");
  }
  STD_TORCH_CHECK(
      (order == 2 && bins >= 1 && bins <= kMaxBins) || (order == 3 && bins >= 1 && bins <= 32),
      "mmfuse: pairs have 1 to 256 bins, triples 1 to 32");
  STD_TORCH_CHECK(tuples.size() % order == 0, "mmfuse: tuples must hold `order` indices each");
  for (const int64_t k : tuples) {
    STD_TORCH_CHECK(k >= 0 && k < static_cast<int64_t>(data.size()),
                    "mmfuse: tuples must be indices into data");
  }
  const int64_t count = static_cast<int64_t>(tuples.size()) / order;
  const int64_t problems = data[0].size(0);
  Tensor counts = empty_on_cpu({count, problems, power(bins, order)}, ScalarType::Long);
  Tensor entropies = empty_on_cpu({count, problems, (1 << order) - 1}, ScalarType::Double);
  JointCounter(data, tuples, static_cast<int>(order), static_cast<int>(bins),
               static_cast<int64_t*>(counts.mutable_data_ptr()),
               static_cast<double*>(entropies.mutable_data_ptr()))
      .run();
  return {entropies, counts};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("joint_entropies.cpu", TORCH_BOX(&mmfuse::cpu::joint_entropies));
}
