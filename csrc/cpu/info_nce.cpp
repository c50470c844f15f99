#include "info_nce.h"

#include "glue/chunks.h"
#include "glue/coefficients.h"
#include "glue/info_nce_tiles.h"

#define MMFUSE_KERNEL "cpu/info_nce_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Small beside the features' own memory, large enough for a fast product.
constexpr int64_t kTileElements = int64_t{1} << 20;

// Calls f(tile) for all tiles, row after row of them, of a divided by the temperature; f may
// overwrite the values.
template <typename F>
void for_each_tile(const Tensor& a, const Tensor& b, const Tensor& temperature, const F& f) {
  const NoGrad no_grad;
  const int64_t batch = a.size(0), width = a.size(1);
  const ScalarType dtype = temperature.scalar_type();
  const TileShape shape = tile_shape(batch, kTileElements);
  const Tensor wide_b = torch::stable::to(b, dtype);
  const Tensor values = torch::stable::new_empty(a, {shape.rows * shape.columns}, dtype);
  const Tensor scaled = torch::stable::new_empty(a, {shape.rows * width}, dtype);
  for (int64_t row = 0; row < batch; row += shape.rows) {
    const int64_t rows = std::min(shape.rows, batch - row);
    const Tensor scaled_a = matrix_in(scaled, rows, width);
    divide(torch::stable::to(rows_of(a, row, rows), dtype), temperature, scaled_a);
    for (int64_t column = 0; column < batch; column += shape.columns) {
      const int64_t columns = std::min(shape.columns, batch - column);
      const Tensor tile = matrix_in(values, rows, columns);
      const Tensor tile_b = rows_of(wide_b, column, columns);
      call_out("aten::mm", "out", scaled_a, torch::stable::transpose(tile_b, 0, 1), tile);
      f(SimilarityTile{tile, scaled_a, tile_b, row, column});
    }
  }
}

// The gradients of a and b; to_slope(tile) turns the similarities into the loss's slopes in place.
template <typename F>
std::tuple<Tensor, Tensor> product_gradients(const Tensor& a, const Tensor& b,
                                             const Tensor& temperature, const F& to_slope) {
  const NoGrad no_grad;
  const ScalarType dtype = temperature.scalar_type();
  const Tensor grad_a = torch::stable::new_zeros(a, {a.size(0), a.size(1)}, dtype);
  const Tensor grad_b = torch::stable::new_zeros(b, {b.size(0), b.size(1)}, dtype);
  for_each_tile(a, b, temperature, [&](const SimilarityTile& tile) {
    to_slope(tile);
    const int64_t rows = tile.a.size(0), columns = tile.b.size(0);
    add_product(tile.values, tile.b, rows_of(grad_a, tile.row, rows));
    add_product(torch::stable::transpose(tile.values, 0, 1), tile.a,
                rows_of(grad_b, tile.column, columns));
  });
  divide(grad_a, temperature, grad_a);
  return {torch::stable::to(grad_a, a.scalar_type()), torch::stable::to(grad_b, b.scalar_type())};
}

// The cost of an element of a similarity matrix, forwards or backwards.
Nanoseconds cost_of(const SimilarityBlock& block) {
  return block.rows * block.columns * ns(block.dtype == DType::kFloat64 ? 2 : 0.8);
}

// Running log-sum-exp of many rows or columns.
class LogSumExp {
 public:
  explicit LogSumExp(int64_t count)
      : max_(count, -std::numeric_limits<double>::infinity()), sum_(count) {}

  RunningSums from(int64_t i) { return {max_.data() + i, sum_.data() + i}; }

  void add(int64_t i, double max, double sum) {
    const double most = std::max(max_[i], max);
    sum_[i] = sum_[i] * std::exp(shift_of(max_[i]) - shift_of(most)) +
              sum * std::exp(shift_of(max) - shift_of(most));
    max_[i] = most;
  }

  double result(int64_t i) const { return max_[i] + std::log(sum_[i]); }

 private:
  // The sum is as finite as the kernel's own.
  static double shift_of(double max) {
    return std::clamp(max, std::numeric_limits<double>::lowest(),
                      std::numeric_limits<double>::max());
  }

  std::vector<double> max_;
  std::vector<double> sum_;
};

SimilarityBlock block_of(const SimilarityTile& tile) {
  const Tensor& values = tile.values;
  return {dtype_of(values), const_cast<void*>(values.const_data_ptr()), values.size(1),
          values.size(0), values.size(1)};
}

void* at(const SimilarityBlock& block, int64_t i) {
  return static_cast<char*>(block.values) + i * element_size(block.dtype);
}

double number_at(DType dtype, const void* data, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(data)[i]
                                  : static_cast<const float*>(data)[i];
}

void add_tile(const SimilarityTile& tile, LogSumExp* rows, LogSumExp* columns) {
  const SimilarityBlock all = block_of(tile);
  const int64_t stripes = (all.columns + kStripeColumns - 1) / kStripeColumns;
  // The stripes' own sums of each row, to be merged in order.
  std::vector<double> max(stripes * all.rows), sum(stripes * all.rows);
  const auto kernel = MMFUSE_SIMD_SELECT(add_stripe);
  parallel_steps(all.columns, kStripeColumns, cost_of(all),
                 [&](int64_t i, int64_t begin, int64_t end) {
                   SimilarityBlock stripe = all;
                   stripe.values = at(all, begin);
                   stripe.columns = end - begin;
                   kernel(stripe, {max.data() + i * all.rows, sum.data() + i * all.rows},
                          columns->from(tile.column + begin));
                 });
  for (int64_t i = 0; i < stripes; ++i) {
    for (int64_t r = 0; r < all.rows; ++r) {
      rows->add(tile.row + r, max[i * all.rows + r], sum[i * all.rows + r]);
    }
  }
}

// Copies the tile's part of the whole matrix's diagonal.
void add_diagonal(const SimilarityTile& tile, double* diagonal) {
  const SimilarityBlock block = block_of(tile);
  const int64_t begin = std::max(tile.row, tile.column);
  const int64_t end = std::min(tile.row + block.rows, tile.column + block.columns);
  for (int64_t i = begin; i < end; ++i) {
    diagonal[i] =
        number_at(block.dtype, block.values, (i - tile.row) * block.stride + (i - tile.column));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> info_nce(const Tensor& a, const Tensor& b,
                                            const Tensor& temperature) {
  check_info_nce(a, b, temperature);
  const int64_t batch = a.size(0);
  LogSumExp row_sums(batch), column_sums(batch);
  std::vector<double> terms(batch);
  for_each_tile(a, b, temperature, [&](const SimilarityTile& tile) {
    add_tile(tile, &row_sums, &column_sums);
    add_diagonal(tile, terms.data());
  });

  Tensor rows = empty_on_cpu({batch}, temperature.scalar_type());
  Tensor columns = torch::stable::empty_like(rows);
  for (int64_t i = 0; i < batch; ++i) {
    const double row = row_sums.result(i), column = column_sums.result(i);
    write_number(rows, i, row);
    write_number(columns, i, column);
    terms[i] -= (row + column) / 2;
  }
  const double mean = pairwise_sum(terms.data(), terms.size()) / static_cast<double>(batch);
  const double bound = mean + std::log(static_cast<double>(batch));
  return {number_on_cpu(bound, dtype_of(rows)), rows, columns};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& grad, const Tensor& a,
                                                     const Tensor& b, const Tensor& temperature,
                                                     const Tensor& rows, const Tensor& columns) {
  check_info_nce(a, b, temperature);
  check_log_sums(rows, columns, a.size(0), temperature);
  const int64_t batch = a.size(0);
  const DType dtype = dtype_of(temperature);
  const double scale = Coefficients(grad, 1, "grad")[0] / static_cast<double>(batch);
  const auto kernel = MMFUSE_SIMD_SELECT(slope_rows);
  double product = 0;
  const auto to_slope = [&](const SimilarityTile& tile) {
    const SimilarityBlock all = block_of(tile);
    product += sum_of_steps(all.rows, kBlockRows, cost_of(all), [&](int64_t begin, int64_t end) {
      SimilarityBlock part = all;
      part.values = at(all, begin * all.stride);
      part.rows = end - begin;
      const int64_t size = element_size(dtype), row = tile.row + begin;
      return kernel(part, {static_cast<const char*>(rows.const_data_ptr()) + row * size,
                           static_cast<const char*>(columns.const_data_ptr()) + tile.column * size,
                           row - tile.column, scale});
    });
  };
  const auto [grad_a, grad_b] = product_gradients(a, b, temperature, to_slope);
  const double tau = Coefficients(temperature, 1, "temperature")[0];
  return {grad_a, grad_b, number_on_cpu(-scale * product / tau, dtype)};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("info_nce.cpu", TORCH_BOX(&mmfuse::cpu::info_nce));
  m.impl("info_nce_backward.cpu", TORCH_BOX(&mmfuse::cpu::info_nce_backward));
}
