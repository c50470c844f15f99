#include "update_grads.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

void launch(UpdateGradsParams& call, const Tensor& scale, const std::optional<Tensor>& finite,
            const std::optional<Tensor>& sq_norm) {
  if (finite) call.common.finite = static_cast<bool*>(finite->mutable_data_ptr());
  const DeviceScope device(scale);
  std::optional<Tensor> partials;
  if (sq_norm) {
    const Coefficients out = coefficients_of(*sq_norm, call.tensors.size(), "sq_norm");
    partials = new_empty(scale, {update_chunks(call.tensors)}, ScalarType::Double);
    call.partials = static_cast<double*>(partials->mutable_data_ptr());
    call.sq_norm = sq_norm->mutable_data_ptr();
    call.wide_sq_norm = out.wide;
  }
  launch_update_grads(call, device.stream());
}

}  // namespace

void update_grads_(const TensorList& grads, const Tensor& scale, const TensorList& params,
                   const TensorList& anchors, const std::optional<Tensor>& pull,
                   const std::optional<Tensor>& noise_std, const std::optional<Tensor>& noise_state,
                   const std::vector<int64_t>& noise_ids, const std::vector<int64_t>& noise_offsets,
                   const std::optional<Tensor>& finite, const std::optional<Tensor>& sq_norm) {
  const size_t count = grads.size();
  UpdateGradsParams call;
  call.tensors = grad_tensors(grads, params, anchors, true);
  call.common.scale = coefficients_of(scale, count, "scale");
  if (pull) {
    STD_TORCH_CHECK(params.size() == count, "mmfuse: pull needs a parameter for each gradient");
    call.common.pull = coefficients_of(*pull, count, "pull");
  }
  if (noise_std) {
    STD_TORCH_CHECK(noise_ids.size() == count && noise_offsets.size() == count,
                    "mmfuse: noise_std needs one noise id and one noise offset per gradient");
    call.common.noise_std = coefficients_of(*noise_std, count, "noise_std");
    call.common.noise_state = noise_state_of(noise_state);
    for (size_t t = 0; t < count; ++t) {
      call.tensors[t].noise_id = static_cast<uint32_t>(noise_ids[t]);
      call.tensors[t].noise_offset = noise_offsets[t];
    }
  }
  launch(call, scale, finite, sq_norm);
}

// The same of a table, with its parameters and anchors if there is a pull. `advance`: the stream's
// step is the next one afterwards, unless `finite` is false; `done`, int32 [1] and 0, spares that a
// launch.
void update_grads_table_(const Tensor& table, const Tensor& scale,
                         const std::optional<Tensor>& pull, const std::optional<Tensor>& noise_std,
                         const std::optional<Tensor>& noise_state,
                         const std::optional<Tensor>& finite, const std::optional<Tensor>& sq_norm,
                         bool advance, const std::optional<Tensor>& done) {
  UpdateGradsParams call;
  call.tensors = grad_tensors(Rows(table, pull.has_value()), pull.has_value());
  call.common.scale = coefficients_of(scale, call.tensors.size(), "scale");
  if (pull) call.common.pull = coefficients_of(*pull, call.tensors.size(), "pull");
  if (noise_std) {
    call.common.noise_std = coefficients_of(*noise_std, call.tensors.size(), "noise_std");
    call.common.noise_state = noise_state_of(noise_state);
  }
  if (advance) {
    STD_TORCH_CHECK(noise_std && finite, "mmfuse: advance needs noise and finite");
    int64_t* step = static_cast<int64_t*>(noise_state->mutable_data_ptr()) + 1;
    const int64_t blocks = noisy_blocks(call.tensors);
    if (done && blocks > 0 && blocks <= INT32_MAX) {
      STD_TORCH_CHECK(done->scalar_type() == ScalarType::Int && done->numel() == 1,
                      "mmfuse: done must be int32, with one element");
      call.common.done = static_cast<int32_t*>(done->mutable_data_ptr());
      call.common.blocks = static_cast<int32_t>(blocks);
      call.common.step = step;
    } else {
      call.advanced = step;
    }
  }
  launch(call, scale, finite, sq_norm);
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("update_grads_.cuda", TORCH_BOX(&mmfuse::cuda::update_grads_));
  m.impl("update_grads_table_.cuda", TORCH_BOX(&mmfuse::cuda::update_grads_table_));
}
