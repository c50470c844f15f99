#include "info_nce.h"

#include "glue/cuda_tensors.h"
#include "glue/info_nce_tiles.h"

namespace mmfuse::cuda {
namespace {

Tile tile_of(const SimilarityTile& tile) {
  const Tensor& values = tile.values;
  return {values.mutable_data_ptr(),          values.size(0), values.size(1), tile.row, tile.column,
          dtype_of(values) == DType::kFloat64};
}

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
    launch_add_tile(tile_of(tile), call.state, device.stream());
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
  const TileShape shape = tile_shape(batch);
  const int64_t count = slope_blocks(shape.rows, shape.columns);
  Tensor partials = torch::stable::new_zeros(a, {count}, ScalarType::Double);
  Tensor grad_temperature = torch::stable::empty_like(temperature);
  SlopeParams slope{};
  slope.rows = rows.const_data_ptr();
  slope.columns = columns.const_data_ptr();
  slope.grad = coefficients_of(grad, 1, "the gradient");
  slope.batch = batch;
  slope.partials = static_cast<double*>(partials.mutable_data_ptr());
  const auto [grad_a, grad_b] =
      product_gradients(a, b, temperature, [&](const SimilarityTile& tile) {
        slope.tile = tile_of(tile);
        launch_slope(slope, device.stream());
      });
  launch_grad_temperature(
      {slope.partials, count, slope.grad, coefficients_of(temperature, 1, "temperature"), batch,
       grad_temperature.mutable_data_ptr()},
      device.stream());
  return {grad_a, grad_b, grad_temperature};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("info_nce.cuda", TORCH_BOX(&mmfuse::cuda::info_nce));
  m.impl("info_nce_backward.cuda", TORCH_BOX(&mmfuse::cuda::info_nce_backward));
}
