// A list of gradients as a table, which costs the dispatcher one tensor instead of a list of them.
#pragma once

#include "tensors.h"

namespace mmfuse {

// Filled by csrc/python/gradients.h with what it has just read and the caller holds on to:
// contiguous, on one device, not empty.
struct GradRow {
  int64_t data;
  int64_t numel;
  int64_t dtype;
  int64_t id;  // in the noise stream

  void* pointer() const { return reinterpret_cast<void*>(data); }
  DType type() const { return static_cast<DType>(dtype); }
};

constexpr int64_t kRowNumbers = sizeof(GradRow) / sizeof(int64_t);

class Rows {
 public:
  explicit Rows(const Tensor& table) {
    STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                        table.device().is_cpu() && table.dim() == 2 && table.size(1) == kRowNumbers,
                    "mmfuse: a table of gradients is int64 [T, ", kRowNumbers, "] on the CPU");
    count_ = static_cast<size_t>(table.size(0));
    rows_ = static_cast<const GradRow*>(table.const_data_ptr());
    for (const GradRow& row : *this) {
      STD_TORCH_CHECK(row.data != 0 && row.numel > 0 && row.dtype >= 0 && row.dtype <= 3,
                      "mmfuse: this is no table of gradients");
    }
  }

  size_t size() const { return count_; }
  const GradRow& operator[](size_t t) const { return rows_[t]; }
  const GradRow* begin() const { return rows_; }
  const GradRow* end() const { return rows_ + count_; }

  bool wide() const {
    for (const GradRow& row : *this) {
      if (row.type() == DType::kFloat64) return true;
    }
    return false;
  }

 private:
  size_t count_;
  const GradRow* rows_;
};

}  // namespace mmfuse
