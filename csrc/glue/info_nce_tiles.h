// The tiles of info_nce's similarities, for the glue of every device: PyTorch multiplies, the
// backend's own kernels do what comes after. Only out= overloads are called; autocast leaves them
// alone.
#pragma once

#include <algorithm>
#include <array>

#include "tensors.h"

namespace mmfuse {

constexpr int64_t kTileColumns = 2048;

struct TileShape {
  int64_t rows;
  int64_t columns;
};

inline TileShape tile_shape(int64_t batch, int64_t elements) {
  const int64_t columns = std::clamp<int64_t>(batch, 1, kTileColumns);
  return {std::clamp<int64_t>(elements / columns, 1, batch), columns};
}

// Similarities of some rows of a and some rows of b.
struct C10_HIDDEN SimilarityTile {
  Tensor values;  // [rows, columns]
  Tensor a;       // [rows, D]
  Tensor b;       // [columns, D]
  int64_t row;    // of the first element in the whole
  int64_t column;
};

template <typename... Args>
inline void call_out(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  // The result is another handle of `out`, which is the callers to release.
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

inline void divide(const Tensor& x, const Tensor& divisor, const Tensor& out) {
  call_out("aten::div", "out", x, divisor, out);
}

// out += x . y. The stable ABI has no Scalar and so no addmm; linear with a full bias is the same.
inline void add_product(const Tensor& x, const Tensor& y, const Tensor& out) {
  call_out("aten::linear", "out", x, torch::stable::transpose(y, 0, 1), std::optional<Tensor>(out),
           out);
}

inline Tensor rows_of(Tensor tensor, int64_t begin, int64_t count) {
  return torch::stable::narrow(tensor, 0, begin, count);
}

// The first elements of a buffer, as a matrix.
inline Tensor matrix_in(const Tensor& buffer, int64_t rows, int64_t columns) {
  return torch::stable::view(rows_of(buffer, 0, rows * columns), {rows, columns});
}

inline void check_info_nce(const Tensor& a, const Tensor& b, const Tensor& temperature) {
  check_contiguous({a, b, temperature}, "features and temperature");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) &&
                      a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type() && a.size(0) > 0,
                  "mmfuse: a and b must be [B, D], of one shape and one dtype");
  STD_TORCH_CHECK(temperature.dim() == 0 && temperature.scalar_type() == result_type({a}),
                  "mmfuse: temperature must be 0-d, float64 for float64 features, else float32");
}

inline void check_log_sums(const Tensor& rows, const Tensor& columns, int64_t batch,
                           const Tensor& temperature) {
  check_contiguous({rows, columns}, "rows and columns");
  STD_TORCH_CHECK(rows.numel() == batch && columns.numel() == batch &&
                      rows.scalar_type() == temperature.scalar_type() &&
                      columns.scalar_type() == temperature.scalar_type(),
                  "mmfuse: rows and columns must be [B], of the temperature's dtype");
}

// Out= overloads refuse tensors that want a gradient; this op's own is registered in Python.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace mmfuse
