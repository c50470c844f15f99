#include "joint_entropies.h"

#include <cmath>
#include <limits>
#include <mutex>

#include "glue/chunks.h"
#include "glue/joint_counter.h"
#include "glue/margins.h"
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

// A call's tables, and how they are counted.
struct Table : JointTables {
  explicit Table(const JointTables& tables)
      : JointTables(tables),
        count(static_cast<int64_t>(tables.tuples.size()) / order),
        cells(power(bins, order)) {
    while (copies < kMaxCopies && 2 * copies * cells * count <= kCopiedCells) copies *= 2;
  }
  int64_t count;
  int64_t cells;
  int copies = 1;
};

class JointCounter {
 public:
  JointCounter(const TensorList& data, const std::vector<JointTables>& tables)
      : dtype_(dtype_of(data[0])),
        tables_(tables.begin(), tables.end()),
        problems_(data[0].size(0)),
        length_(data[0].size(1)) {
    for (const Tensor& x : data) data_.push_back(static_cast<const char*>(x.const_data_ptr()));
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
      std::vector<RowBins> rows(tables_.size() * data_.size());
      for (int64_t p = begin; p < end; ++p) {
        for (size_t k = 0; k < data_.size(); ++k) {
          set_rows(range_(slice(k, p, 0, length_)), &rows[k]);
        }
        clear(p);
        for (int64_t i = 0; i < length_; i += kMaxPiece) {
          count_piece(p, i, std::min(length_, i + kMaxPiece), rows.data(), &scratch);
          flush(p, rows.data(), &scratch);
        }
        for (size_t t = 0; t < tables_.size(); ++t) {
          for (int64_t q = 0; q < tables_[t].count; ++q) finish(t, q, p, rows.data());
        }
      }
    });
  }

 private:
  // The buffers of one task.
  struct Scratch {
    explicit Scratch(const JointCounter& job) : index(job.data_.size() * kBinTile) {
      for (const Table& table : job.tables_) {
        hits.emplace_back(table.count * table.copies * table.cells);
      }
    }
    std::vector<int32_t> index;
    std::vector<std::vector<uint32_t>> hits;
  };

  // Few long problems: their rows are cut into pieces.
  void run_pieces(int64_t tasks) {
    const size_t variables = data_.size();
    const int64_t wanted = (tasks + problems_ - 1) / problems_;
    // A task also empties its histograms.
    int64_t least = kMinPiece;
    for (const Table& table : tables_) least = std::max(least, 2 * table.cells);
    const int64_t step = std::min(kMaxPiece, std::max(least, (length_ + wanted - 1) / wanted));
    const int64_t pieces = (length_ + step - 1) / step;
    std::vector<RowRange> ranges(problems_ * variables * pieces);
    parallel_each(static_cast<int64_t>(ranges.size()), range_cost(), [&](int64_t i) {
      const int64_t begin = i % pieces * step, row = i / pieces;
      ranges[i] =
          range_(slice(row % variables, row / variables, begin, std::min(length_, begin + step)));
    });
    // The bins of all tables for each problem, as in `run`.
    const size_t own = tables_.size() * variables;
    std::vector<RowBins> rows(problems_ * own);
    for (size_t r = 0; r < problems_ * variables; ++r) {
      RowRange range = ranges[r * pieces];
      for (int64_t i = 1; i < pieces; ++i) {
        const RowRange& other = ranges[r * pieces + i];
        range.low = std::min(range.low, other.low);
        range.high = std::max(range.high, other.high);
        range.finite &= other.finite;
      }
      set_rows(range, &rows[r / variables * own + r % variables]);
    }
    for (int64_t p = 0; p < problems_; ++p) clear(p);
    std::mutex mutex;
    parallel_each(problems_ * pieces, count_cost(), [&](int64_t i) {
      const int64_t p = i / pieces, begin = i % pieces * step;
      const RowBins* bins = &rows[p * own];
      Scratch scratch(*this);
      count_piece(p, begin, std::min(length_, begin + step), bins, &scratch);
      const std::lock_guard<std::mutex> lock(mutex);
      flush(p, bins, &scratch);
    });
    for (size_t t = 0; t < tables_.size(); ++t) {
      const int64_t count = tables_[t].count * problems_;
      parallel_each(count, count * entropy_cost(tables_[t]), [&](int64_t i) {
        const int64_t p = i % problems_;
        finish(t, i / problems_, p, &rows[p * own]);
      });
    }
  }

  Nanoseconds range_cost() const {
    return problems_ * length_ * static_cast<double>(data_.size()) * ns(wide() ? 0.08 : 0.05);
  }

  // Two bins are compared with one edge; others take a place for each value, then a count.
  Nanoseconds count_cost() const {
    Nanoseconds cost = ns(0);
    const double place = static_cast<double>(data_.size()) * (wide() ? 0.5 : 0.2);
    for (const Table& table : tables_) {
      const double tuples = static_cast<double>(table.count);
      cost = cost + ns(table.bins == 2 ? tuples * (wide() ? 0.2 : 0.07) : place + tuples * 0.2);
    }
    return problems_ * length_ * cost;
  }

  Nanoseconds entropy_cost() const {
    Nanoseconds cost = ns(0);
    for (const Table& table : tables_) cost = cost + table.count * entropy_cost(table);
    return problems_ * cost;
  }

  // The cost of one tuple.
  static Nanoseconds entropy_cost(const Table& table) { return table.cells * ns(1.5); }

  bool wide() const { return dtype_ == DType::kFloat64; }

  RowSlice slice(int64_t variable, int64_t problem, int64_t begin, int64_t end) const {
    return {dtype_, data_[variable] + problem * length_ * element_size(dtype_), begin, end};
  }

  // The bins of one variable in all tables, which are as many rows apart as there are variables.
  void set_rows(const RowRange& range, RowBins* row) const {
    for (const Table& table : tables_) {
      row->bins = table.bins;
      if (dtype_ == DType::kFloat64) {
        set_bins<double>(range, row);
      } else {
        set_bins<float>(range, row);
      }
      row += data_.size();
    }
  }

  static bool is_valid(const Table& table, int64_t tuple, const RowBins* rows) {
    const int64_t* members = &table.tuples[tuple * table.order];
    return std::all_of(members, members + table.order, [&](int64_t k) { return rows[k].valid; });
  }

  int64_t* counts_of(const Table& table, int64_t tuple, int64_t problem) const {
    return table.counts + (tuple * problems_ + problem) * table.cells;
  }

  static Histogram histogram(const Table& table, int64_t tuple, std::vector<uint32_t>* hits) {
    return {hits->data() + tuple * table.copies * table.cells, table.cells, table.copies};
  }

  void clear(int64_t problem) const {
    for (const Table& table : tables_) {
      for (int64_t q = 0; q < table.count; ++q) {
        std::fill_n(counts_of(table, q, problem), table.cells, 0);
      }
    }
  }

  void count_piece(int64_t problem, int64_t begin, int64_t end, const RowBins* rows,
                   Scratch* scratch) const {
    for (size_t t = 0; t < tables_.size(); ++t, rows += data_.size()) {
      const Table& table = tables_[t];
      if (table.bins == 2) {
        count_halves(table, problem, begin, end, rows, &scratch->hits[t]);
        continue;
      }
      for (int64_t at = begin; at < end; at += kBinTile) {
        const int64_t stop = std::min(end, at + kBinTile);
        for (size_t k = 0; k < data_.size(); ++k) {
          if (rows[k].valid)
            bin_(slice(k, problem, at, stop), rows[k], &scratch->index[k * kBinTile]);
        }
        for (int64_t q = 0; q < table.count; ++q) {
          if (!is_valid(table, q, rows)) continue;
          const int32_t* index[kMaxOrder];
          for (int i = 0; i < table.order; ++i) {
            index[i] = &scratch->index[table.tuples[q * table.order + i] * kBinTile];
          }
          count_(index, table.order, table.bins, stop - at, histogram(table, q, &scratch->hits[t]));
        }
      }
    }
  }

  // Two bins need no indices.
  void count_halves(const Table& table, int64_t problem, int64_t begin, int64_t end,
                    const RowBins* rows, std::vector<uint32_t>* hits) const {
    for (int64_t q = 0; q < table.count; ++q) {
      if (!is_valid(table, q, rows)) continue;
      RowSlice slices[kMaxOrder];
      const RowBins* bins[kMaxOrder];
      for (int i = 0; i < table.order; ++i) {
        const int64_t k = table.tuples[q * table.order + i];
        slices[i] = slice(k, problem, begin, end);
        bins[i] = &rows[k];
      }
      halves_(slices, bins, table.order, histogram(table, q, hits).hits);
    }
  }

  void flush(int64_t problem, const RowBins* rows, Scratch* scratch) const {
    for (size_t t = 0; t < tables_.size(); ++t, rows += data_.size()) {
      const Table& table = tables_[t];
      for (int64_t q = 0; q < table.count; ++q) {
        if (!is_valid(table, q, rows)) continue;
        flush_(histogram(table, q, &scratch->hits[t]), counts_of(table, q, problem));
      }
    }
  }

  void finish(size_t t, int64_t tuple, int64_t problem, const RowBins* rows) const {
    const Table& table = tables_[t];
    double* out = table.entropies + (tuple * problems_ + problem) * ((1 << table.order) - 1);
    const bool valid = is_valid(table, tuple, rows + t * data_.size());
    write_entropies(counts_of(table, tuple, problem), table.order, table.bins, valid ? length_ : 0,
                    out);
  }

  DType dtype_;
  std::vector<const char*> data_;
  std::vector<Table> tables_;
  int64_t problems_;
  int64_t length_;
  decltype(&generic::row_range) range_ = MMFUSE_SIMD_SELECT(row_range);
  decltype(&generic::bin_tile) bin_ = MMFUSE_SIMD_SELECT(bin_tile);
  decltype(&generic::count_halves) halves_ = MMFUSE_SIMD_SELECT(count_halves);
  decltype(&generic::count_tile) count_ = MMFUSE_SIMD_SELECT(count_tile);
  decltype(&generic::flush_histogram) flush_ = MMFUSE_SIMD_SELECT(flush_histogram);
};

}  // namespace

void count_jointly(const TensorList& data, const std::vector<JointTables>& tables) {
  STD_TORCH_CHECK(!data.empty() && data[0].numel() > 0, "mmfuse: there is nothing to count");
  check_contiguous(data, "data");
  for (const Tensor& x : data) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == data[0].size(0) && x.size(1) == data[0].size(1) &&
                        x.scalar_type() == data[0].scalar_type(),
                    "mmfuse: data must be [P, N], of one dtype and shape");
  }
  JointCounter(data, tables).run();
}

int64_t joint_cells(int64_t order, int64_t bins) {
  STD_TORCH_CHECK(
      (order == 2 && bins >= 1 && bins <= kMaxBins) || (order == 3 && bins >= 1 && bins <= 32),
      "mmfuse: pairs have 1 to 256 bins, triples 1 to 32");
  return power(bins, static_cast<int>(order));
}

std::tuple<Tensor, Tensor> joint_entropies(const TensorList& data,
                                           const std::vector<int64_t>& tuples, int64_t order,
                                           int64_t bins) {
  STD_TORCH_CHECK(!data.empty() && data[0].dim() == 2, "mmfuse: data must be [P, N]");
  const int64_t cells = joint_cells(order, bins);
  STD_TORCH_CHECK(tuples.size() % order == 0, "mmfuse: tuples must hold `order` indices each");
  for (const int64_t k : tuples) {
    STD_TORCH_CHECK(k >= 0 && k < static_cast<int64_t>(data.size()),
                    "mmfuse: tuples must be indices into data");
  }
  const int64_t count = static_cast<int64_t>(tuples.size()) / order;
  const int64_t problems = data[0].size(0);
  Tensor counts = empty_on_cpu({count, problems, cells}, ScalarType::Long);
  Tensor entropies = empty_on_cpu({count, problems, (1 << order) - 1}, ScalarType::Double);
  count_jointly(data, {{tuples, static_cast<int>(order), static_cast<int>(bins),
                        static_cast<int64_t*>(counts.mutable_data_ptr()),
                        static_cast<double*>(entropies.mutable_data_ptr())}});
  return {entropies, counts};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("joint_entropies.cpu", TORCH_BOX(&mmfuse::cpu::joint_entropies));
}
