#include "info_nce.h"

#include "glue/cuda_tensors.h"
#include "glue/info_nce_tiles.h"

namespace mmfuse::cuda {
namespace {

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

// out = x . y. Halves are multiplied as they are, on tensor cores; their products are exact in
// float32, in which they are added, and which `out` has.
void multiply(const Tensor& x, const Tensor& y, const Tensor& out) {
  if (!is_half(x)) {
    call_out("aten::mm", "out", x, y, out);
    return;
  }
#ifdef MMFUSE_CUDA_ON_CPU
  // PyTorch has no such product on the CPU.
  const ScalarType wide = out.scalar_type();
  call_out("aten::mm", "out", torch::stable::to(x, wide), torch::stable::to(y, wide), out);
#else
  // cuBLAS is not asked for products without a term, or without a result.
  if (x.numel() == 0 || y.numel() == 0) return (void)torch::stable::zero_(const_cast<Tensor&>(out));
  call_out("aten::mm", "dtype_out", x, y, out.scalar_type(), out);
#endif
}

// Calls f(tile) for all tiles of inner products, row after row of them; f may overwrite the values.
template <typename F>
void for_each_tile(const Tensor& a, const Tensor& b, const Tensor& temperature, const F& f) {
  const NoGrad no_grad;
  const int64_t batch = a.size(0);
  const TileShape shape = tile_shape(batch, kTileElements);
  const Tensor values = new_empty(a, {shape.rows * shape.columns}, temperature.scalar_type());
  for (int64_t row = 0; row < batch; row += shape.rows) {
    const int64_t rows = std::min(shape.rows, batch - row);
    const Tensor tile_a = rows_of(a, row, rows);
    for (int64_t column = 0; column < batch; column += shape.columns) {
      const int64_t columns = std::min(shape.columns, batch - column);
      const Tensor tile = matrix_in(values, rows, columns);
      const Tensor tile_b = rows_of(b, column, columns);
      multiply(tile_a, torch::stable::transpose(tile_b, 0, 1), tile);
      f(SimilarityTile{tile, tile_a, tile_b, row, column});
    }
  }
}

Tile tile_of(const SimilarityTile& tile, const Tensor& temperature) {
  const Tensor& values = tile.values;
  return {values.mutable_data_ptr(),
          values.size(0),
          values.size(1),
          tile.row,
          tile.column,
          dtype_of(values) == DType::kFloat64,
          coefficients_of(temperature, 1, "temperature")};
}

// Adds a tile's slopes' products to the gradients of a and b, without the temperature.
class TileGradients {
 public:
  TileGradients(const Tensor& a, const SlopeParams& slope, cudaStream_t stream)
      : slope_(slope), stream_(stream), half_(is_half(a)) {
    const ScalarType dtype = half_ ? ScalarType::Float : a.scalar_type();
    grad_a = torch::stable::new_zeros(a, {a.size(0), a.size(1)}, dtype);
    grad_b = torch::stable::new_zeros(a, {a.size(0), a.size(1)}, dtype);
    const TileShape shape = tile_shape(a.size(0), kTileElements);
    halves_ = new_empty(a, {half_ ? 2 * shape.rows * shape.columns : 0}, a.scalar_type());
    product_ = new_empty(a, {half_ ? std::max(shape.rows, shape.columns) * a.size(1) : 0}, dtype);
  }

  void add(const SimilarityTile& tile, const Tensor& temperature) {
    const int64_t rows = tile.a.size(0), columns = tile.b.size(0);
    slope_.tile = tile_of(tile, temperature);
    slope_.half_dtype = dtype_of(tile.a);
    slope_.halves = half_ ? halves_.mutable_data_ptr() : nullptr;
    launch_slope(slope_, stream_);
    const Tensor of_a = rows_of(grad_a, tile.row, rows);
    const Tensor of_b = rows_of(grad_b, tile.column, columns);
    if (!half_) {
      add_product(tile.values, tile.b, of_a);
      add_product(torch::stable::transpose(tile.values, 0, 1), tile.a, of_b);
      return;
    }
    for (int64_t k = 0; k < 2; ++k) {
      const Tensor part = torch::stable::view(rows_of(halves_, k * rows * columns, rows * columns),
                                              {rows, columns});
      add_half(part, tile.b, of_a);
      add_half(torch::stable::transpose(part, 0, 1), tile.a, of_b);
    }
  }

  Tensor grad_a, grad_b;

 private:
  void add_half(const Tensor& slopes, const Tensor& features, const Tensor& sums) {
    const Tensor product = matrix_in(product_, sums.size(0), sums.size(1));
    multiply(slopes, features, product);
    launch_add_product({static_cast<float*>(sums.mutable_data_ptr()),
                        static_cast<const float*>(product.const_data_ptr()), product.numel(),
                        slope_.grad, slope_.batch, slope_.half_dtype},
                       stream_);
  }

  SlopeParams slope_;
  cudaStream_t stream_;
  bool half_;
  Tensor halves_, product_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> info_nce(const Tensor& a, const Tensor& b,
                                            const Tensor& temperature) {
  check_info_nce(a, b, temperature);
  const DeviceScope device(a);
  const int64_t batch = a.size(0);
  const ScalarType dtype = temperature.scalar_type();
  Tensor bound = new_empty(a, {}, dtype);
  Tensor rows = new_empty(a, {batch}, dtype);
  Tensor columns = new_empty(a, {batch}, dtype);
  Tensor row_max = new_empty(a, {batch}, dtype), row_sum = new_empty(a, {batch}, dtype);
  Tensor column_max = new_empty(a, {batch}, dtype), column_sum = new_empty(a, {batch}, dtype);
  Tensor diagonal = new_empty(a, {batch}, dtype);
  Tensor partials = new_empty(a, {chunk_count(batch, kFinishRows)}, ScalarType::Double);
  InfoNceParams call{};
  call.state = {row_max.mutable_data_ptr(), row_sum.mutable_data_ptr(),
                column_max.mutable_data_ptr(), column_sum.mutable_data_ptr(),
                diagonal.mutable_data_ptr()};
  call.batch = batch;
  call.wide = dtype == ScalarType::Double;
  call.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.rows = rows.mutable_data_ptr();
  call.columns = columns.mutable_data_ptr();
  call.bound = bound.mutable_data_ptr();
  for_each_tile(a, b, temperature, [&](const SimilarityTile& tile) {
    launch_add_tile(tile_of(tile, temperature), call.state, device.stream());
  });
  launch_info_nce(call, device.stream());
  return {bound, rows, columns};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& grad, const Tensor& a,
                                                     const Tensor& b, const Tensor& temperature,
                                                     const Tensor& rows, const Tensor& columns) {
  check_info_nce(a, b, temperature);
  check_log_sums(rows, columns, a.size(0), temperature);
  const DeviceScope device(a);
  const int64_t batch = a.size(0);
  const TileShape shape = tile_shape(batch, kTileElements);
  const int64_t count = slope_blocks(shape.rows, shape.columns);
  Tensor partials = torch::stable::new_zeros(a, {count}, ScalarType::Double);
  Tensor grad_temperature = torch::stable::empty_like(temperature);
  SlopeParams slope{};
  slope.rows = rows.const_data_ptr();
  slope.columns = columns.const_data_ptr();
  slope.grad = coefficients_of(grad, 1, "the gradient");
  slope.batch = batch;
  slope.partials = static_cast<double*>(partials.mutable_data_ptr());
  TileGradients gradients(a, slope, device.stream());
  for_each_tile(a, b, temperature,
                [&](const SimilarityTile& tile) { gradients.add(tile, temperature); });
  const NoGrad no_grad;
  for (const Tensor& grad_of : {gradients.grad_a, gradients.grad_b}) {
    divide(grad_of, temperature, grad_of);
  }
  launch_grad_temperature(
      {slope.partials, count, slope.grad, coefficients_of(temperature, 1, "temperature"), batch,
       grad_temperature.mutable_data_ptr()},
      device.stream());
  return {torch::stable::to(gradients.grad_a, a.scalar_type()),
          torch::stable::to(gradients.grad_b, b.scalar_type()), grad_temperature};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("info_nce.cuda", TORCH_BOX(&mmfuse::cuda::info_nce));
  m.impl("info_nce_backward.cuda", TORCH_BOX(&mmfuse::cuda::info_nce_backward));
}
