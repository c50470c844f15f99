#include "cpu/simd/update.h"
#include "glue/chunks.h"
#include "glue/coefficients.h"
#include "glue/table.h"

namespace mmfuse::cpu {
namespace {

void update(std::vector<UpdateSlice>& tensors, const std::optional<Tensor>& finite,
            const std::optional<Tensor>& sq_norm) {
  const size_t count = tensors.size();
  std::vector<double> squares(sq_norm ? count : 0);
  if (sq_norm) Coefficients(*sq_norm, count, "sq_norm");  // checks it
  const bool all_finite =
      launch_update(tensors, finite.has_value(), sq_norm ? squares.data() : nullptr);
  if (sq_norm) {
    Tensor out = *sq_norm;
    for (size_t t = 0; t < count; ++t) write_number(out, t, squares[t]);
  }
  if (finite && !all_finite) *static_cast<bool*>(finite->mutable_data_ptr()) = false;
}

}  // namespace

void update_grads_(const TensorList& grads, const Tensor& scale, const TensorList& params,
                   const TensorList& anchors, const std::optional<Tensor>& pull,
                   const std::optional<Tensor>& noise_std, const std::optional<Tensor>& noise_state,
                   const std::vector<int64_t>& noise_ids, const std::vector<int64_t>& noise_offsets,
                   const std::optional<Tensor>& finite, const std::optional<Tensor>& sq_norm) {
  const size_t count = grads.size();
  const bool pulled = pull.has_value();
  if (pulled) {
    STD_TORCH_CHECK(params.size() == count, "mmfuse: pull needs a parameter for each gradient");
    check_pairs(grads, params, anchors);
  }
  const TensorList none;
  const std::vector<RowOrder> orders =
      row_orders(grads, pulled ? params : none, pulled ? anchors : none);
  std::vector<UpdateSlice>& tensors = kept_list<UpdateSlice>(count);
  const Coefficients scales(scale, count, "scale");
  for (size_t t = 0; t < count; ++t) {
    UpdateSlice& slice = tensors[t];
    slice.dtype = dtype_of(grads[t]);
    slice.in = slice.out = grads[t].mutable_data_ptr();
    slice.size = grads[t].numel();
    slice.scale = scales[t];
  }
  if (pulled) {
    const Coefficients pulls(*pull, count, "pull");
    for (size_t t = 0; t < count; ++t) {
      UpdateSlice& slice = tensors[t];
      slice.pull = pulls[t];
      slice.param_dtype = dtype_of(params[t]);
      slice.param = params[t].const_data_ptr();
      if (anchors.empty()) continue;
      slice.anchor_dtype = dtype_of(anchors[t]);
      slice.anchor = anchors[t].const_data_ptr();
    }
  }
  if (noise_std) {
    STD_TORCH_CHECK(noise_state && noise_ids.size() == count && noise_offsets.size() == count,
                    "mmfuse: noise_std needs noise_state, noise_ids and noise_offsets");
    const Coefficients stds(*noise_std, count, "noise_std");
    const int64_t* state = noise_state_of(*noise_state);
    for (size_t t = 0; t < count; ++t) {
      UpdateSlice& slice = tensors[t];
      slice.noise_std = stds[t];
      slice.noise_key = noise_key(state, noise_ids[t]);
      slice.noise_offset = noise_offsets[t];
      if (orders[t].transposed()) {
        slice.channels = orders[t].channels;
        slice.spatial = orders[t].spatial;
      }
    }
  }
  update(tensors, finite, sq_norm);
}

// The same of a table, with its parameters and anchors if there is a pull. `advance`: the stream's
// step is the next one afterwards, unless `finite` is false.
void update_grads_table_(const Tensor& table, const Tensor& scale,
                         const std::optional<Tensor>& pull, const std::optional<Tensor>& noise_std,
                         const std::optional<Tensor>& noise_state,
                         const std::optional<Tensor>& finite, const std::optional<Tensor>& sq_norm,
                         bool advance, const std::optional<Tensor>&) {
  const Rows rows(table, pull.has_value());
  const size_t count = rows.size();
  std::vector<UpdateSlice>& tensors = kept_list<UpdateSlice>(count);
  const Coefficients scales(scale, count, "scale");
  for (size_t t = 0; t < count; ++t) {
    UpdateSlice& slice = tensors[t];
    slice.dtype = rows[t].type();
    slice.in = slice.out = rows[t].pointer();
    slice.size = rows[t].numel;
    slice.scale = scales[t];
  }
  if (pull) {
    const Coefficients pulls(*pull, count, "pull");
    for (size_t t = 0; t < count; ++t) {
      UpdateSlice& slice = tensors[t];
      slice.pull = pulls[t];
      slice.param_dtype = rows[t].param_type();
      slice.param = rows[t].param_pointer();
      slice.anchor_dtype = rows[t].anchor_type();
      slice.anchor = rows[t].anchor_pointer();
    }
  }
  if (noise_std) {
    STD_TORCH_CHECK(noise_state, "mmfuse: noise_std needs noise_state");
    const Coefficients stds(*noise_std, count, "noise_std");
    const int64_t* state = noise_state_of(*noise_state);
    for (size_t t = 0; t < count; ++t) {
      UpdateSlice& slice = tensors[t];
      slice.noise_std = stds[t];
      slice.noise_key = noise_key(state, rows[t].id);
      if (rows[t].order().transposed()) {
        slice.channels = rows[t].channels;
        slice.spatial = rows[t].spatial;
      }
    }
  }
  STD_TORCH_CHECK(!advance || (noise_std && finite), "mmfuse: advance needs noise and finite");
  update(tensors, finite, sq_norm);
  if (advance && *static_cast<const bool*>(finite->const_data_ptr())) {
    ++static_cast<int64_t*>(noise_state->mutable_data_ptr())[1];
  }
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("update_grads_.cpu", TORCH_BOX(&mmfuse::cpu::update_grads_));
  m.impl("update_grads_table_.cpu", TORCH_BOX(&mmfuse::cpu::update_grads_table_));
}
