#include "drop_modalities.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

// The tensors of a call, and outputs like them.
DropModalitiesParams drop_params(const TensorList& tensors, int64_t rows,
                                 const std::optional<Tensor>& scale, TensorList& out) {
  check_contiguous(tensors, "features");
  DropModalitiesParams call{};
  call.rows = rows;
  if (scale) call.scale = coefficients_of(*scale, 1, "scale");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == rows,
                    "mmfuse: features must be [B, ...], of one batch size");
    out.push_back(torch::stable::empty_like(tensor));
    call.tensors.push_back({tensor.const_data_ptr(), out.back().mutable_data_ptr(),
                            rows > 0 ? tensor.numel() / rows : 0, 0, 0, dtype_of(tensor)});
  }
  return call;
}

}  // namespace

std::tuple<TensorList, Tensor> drop_modalities(const TensorList& features, const Tensor& q,
                                               const Tensor& noise_state,
                                               const std::vector<int64_t>& noise_ids,
                                               const std::vector<int64_t>& noise_offsets,
                                               const std::optional<Tensor>& scale) {
  const size_t count = features.size();
  STD_TORCH_CHECK(count > 0, "mmfuse: features must hold at least one modality");
  STD_TORCH_CHECK(noise_ids.size() == count && noise_offsets.size() == count,
                  "mmfuse: drop_modalities needs one noise id and one noise offset per modality");
  STD_TORCH_CHECK(q.is_contiguous() && q.numel() == static_cast<int64_t>(count) &&
                      q.scalar_type() == ScalarType::Float,
                  "mmfuse: q must be float32, contiguous, with one value per modality");
  const DeviceScope device(features[0]);
  const int64_t rows = features[0].size(0);
  TensorList out;
  DropModalitiesParams call = drop_params(features, rows, scale, out);
  for (size_t m = 0; m < count; ++m) {
    call.tensors[m].noise_id = static_cast<uint32_t>(noise_ids[m]);
    call.tensors[m].noise_offset = noise_offsets[m];
  }
  Tensor keep = new_empty(features[0], {static_cast<int64_t>(count), rows}, ScalarType::Bool);
  call.keep = static_cast<bool*>(keep.mutable_data_ptr());
  call.q = static_cast<const float*>(q.const_data_ptr());
  call.noise_state = noise_state_of(noise_state);
  launch_drop_modalities(call, device.stream());
  return {out, keep};
}

TensorList drop_modalities_backward(const TensorList& grads, const Tensor& keep,
                                    const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(!grads.empty() && keep.is_contiguous() && keep.dim() == 2 &&
                      keep.size(0) == static_cast<int64_t>(grads.size()) &&
                      keep.scalar_type() == ScalarType::Bool,
                  "mmfuse: keep must be bool, contiguous, [M, B] for M gradients");
  const DeviceScope device(grads[0]);
  TensorList out;
  DropModalitiesParams call = drop_params(grads, keep.size(1), scale, out);
  call.keep = static_cast<bool*>(const_cast<void*>(keep.const_data_ptr()));
  launch_drop_modalities(call, device.stream());
  return out;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("drop_modalities.cuda", TORCH_BOX(&mmfuse::cuda::drop_modalities));
  m.impl("drop_modalities_backward.cuda", TORCH_BOX(&mmfuse::cuda::drop_modalities_backward));
}
