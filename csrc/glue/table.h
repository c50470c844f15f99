// A list of gradients as a table, which costs the dispatcher one tensor instead of a list of them.
#pragma once

#include "tensors.h"

namespace mmfuse {

// Filled by csrc/python/gradients.h with what it has just read and the caller holds on to:
// contiguous or in channels_last, on one device, not empty; parameter and anchor as their gradient.
struct GradRow {
  int64_t data;
  int64_t numel;
  int64_t dtypes;  // a byte each: of the gradient, the parameter, the anchor
  int64_t id;      // in the noise stream
  int64_t channels, spatial;
  int64_t param, anchor;  // 0 without them

  void* pointer() const { return reinterpret_cast<void*>(data); }
  const void* param_pointer() const { return reinterpret_cast<const void*>(param); }
  const void* anchor_pointer() const { return reinterpret_cast<const void*>(anchor); }
  DType type() const { return static_cast<DType>(dtypes & 0xff); }
  DType param_type() const { return static_cast<DType>(dtypes >> 8 & 0xff); }
  DType anchor_type() const { return static_cast<DType>(dtypes >> 16 & 0xff); }
  RowOrder order() const { return {channels, spatial}; }
};

constexpr int64_t kRowNumbers = sizeof(GradRow) / sizeof(int64_t);

class Rows {
 public:
  // `paired`: the call needs parameters; anchors it takes where there are any.
  explicit Rows(const Tensor& table, bool paired = false) {
    STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                        table.device().is_cpu() && table.dim() == 2 && table.size(1) == kRowNumbers,
                    "mmfuse: a table of gradients is int64 [T, ", kRowNumbers, "] on the CPU");
    count_ = static_cast<size_t>(table.size(0));
    rows_ = static_cast<const GradRow*>(table.const_data_ptr());
    for (const GradRow& row : *this) {
      const bool known = (row.dtypes & ~int64_t{0x030303}) == 0;
      const bool ordered = row.channels > 0 && row.spatial > 0;
      STD_TORCH_CHECK(row.data != 0 && row.numel > 0 && known && ordered,
                      "mmfuse: this is no table of gradients");
      STD_TORCH_CHECK(!paired || row.param != 0, "mmfuse: this table has no parameters");
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

// A result and each row of a matrix, [R, T], as views of it: for calls of a table alone, since what
// autograd and the compiler see may not share memory.
inline TensorList with_rows(const Tensor& first, const Tensor& matrix) {
  TensorList all{first};
  const int64_t width = matrix.size(1), stride = 1;
  for (int64_t r = 0; r < matrix.size(0); ++r) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(matrix.get(), 1, &width, &stride, r * width, &handle));
    all.emplace_back(handle);
  }
  return all;
}

}  // namespace mmfuse
