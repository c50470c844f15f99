#include "grad_stats.h"

#include "glue/chunks.h"
#include "glue/table.h"

#define MMFUSE_KERNEL "cpu/grad_stats_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

template <typename out_t>
void write_moments(const std::vector<Moments<double>>& moments, bool displaced, out_t* out) {
  const size_t count = moments.size();
  for (size_t t = 0; t < count; ++t) {
    out[t] = static_cast<out_t>(moments[t].mean);
    out[count + t] = static_cast<out_t>(moments[t].m2);
    if (!displaced) continue;
    out[2 * count + t] = static_cast<out_t>(moments[t].dot);
    out[3 * count + t] = static_cast<out_t>(moments[t].disp_sq);
  }
}

Nanoseconds cost_of(const StatsSlice& slice) {
  const double read = slice.param == nullptr ? 1 : slice.anchor == nullptr ? 1.5 : 2;
  return slice.size * read * ns(slice.grad_dtype == DType::kFloat64 ? 0.09 : 0.05);
}

std::vector<Moments<double>> all_moments(const std::vector<StatsSlice>& tensors) {
  const std::vector<Chunk>& chunks = make_chunks(tensors);
  const auto kernel = MMFUSE_SIMD_SELECT(slice_moments);
  std::vector<Moments<double>>& parts = kept_list<Moments<double>>(chunks.size());
  Nanoseconds cost = ns(0);
  for (const StatsSlice& slice : tensors) cost = cost + cost_of(slice);
  parallel_each(chunks, cost, [&](const Chunk& chunk, size_t i) {
    StatsSlice slice = tensors[chunk.tensor];
    slice.begin = chunk.begin;
    slice.size = chunk.size;
    parts[i] = kernel(slice);
  });
  std::vector<Moments<double>> moments(tensors.size());
  for (size_t i = 0; i < chunks.size(); ++i) {
    Moments<double>& total = moments[chunks[i].tensor];
    total = merge_moments(total, parts[i]);
  }
  return moments;
}

Tensor sizes_of(const std::vector<StatsSlice>& tensors) {
  Tensor numel = empty_on_cpu({static_cast<int64_t>(tensors.size())}, ScalarType::Long);
  int64_t* sizes = static_cast<int64_t*>(numel.mutable_data_ptr());
  for (size_t t = 0; t < tensors.size(); ++t) sizes[t] = tensors[t].size;
  return numel;
}

Tensor moments_of(const std::vector<StatsSlice>& tensors, bool displaced, ScalarType dtype) {
  const std::vector<Moments<double>> moments = all_moments(tensors);
  Tensor out = empty_on_cpu({displaced ? 4 : 2, static_cast<int64_t>(tensors.size())}, dtype);
  if (dtype == ScalarType::Double) {
    write_moments(moments, displaced, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    write_moments(moments, displaced, static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> grad_stats(const TensorList& grads, const TensorList& params,
                                      const TensorList& anchors) {
  check_pairs(grads, params, anchors);
  row_orders(grads, params, anchors);  // any order will do, if they share it
  const bool displaced = !params.empty();

  std::vector<StatsSlice>& tensors = kept_list<StatsSlice>(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    StatsSlice& slice = tensors[t];
    slice.grad_dtype = dtype_of(grads[t]);
    slice.grad = grads[t].const_data_ptr();
    slice.size = grads[t].numel();
    if (!displaced) continue;
    slice.param_dtype = dtype_of(params[t]);
    slice.param = params[t].const_data_ptr();
    if (anchors.empty()) continue;
    slice.anchor_dtype = dtype_of(anchors[t]);
    slice.anchor = anchors[t].const_data_ptr();
  }
  return {sizes_of(tensors), moments_of(tensors, displaced, result_type(grads))};
}

// The same of a table, of displacements with its parameters, and anchors if it has any: numbers of
// elements, and each moment by itself.
TensorList grad_stats_table(const Tensor& table, const Tensor&, bool displaced) {
  const Rows rows(table, displaced);
  std::vector<StatsSlice>& tensors = kept_list<StatsSlice>(rows.size());
  for (size_t t = 0; t < rows.size(); ++t) {
    tensors[t].grad_dtype = rows[t].type();
    tensors[t].grad = rows[t].pointer();
    tensors[t].size = rows[t].numel;
    if (!displaced) continue;
    tensors[t].param_dtype = rows[t].param_type();
    tensors[t].param = rows[t].param_pointer();
    tensors[t].anchor_dtype = rows[t].anchor_type();
    tensors[t].anchor = rows[t].anchor_pointer();
  }
  const ScalarType dtype = rows.wide() ? ScalarType::Double : ScalarType::Float;
  return with_rows(sizes_of(tensors), moments_of(tensors, displaced, dtype));
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("grad_stats.cpu", TORCH_BOX(&mmfuse::cpu::grad_stats));
  m.impl("grad_stats_table.cpu", TORCH_BOX(&mmfuse::cpu::grad_stats_table));
}
