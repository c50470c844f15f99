// Needed by the glue of every op on a GPU: the dispatch key, the device and its current stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device/params.h"
#include "table.h"
#include "tensors.h"

// tests/kernels/cuda_on_cpu defines MMFUSE_CUDA_ON_CPU and runs the same kernels on CPU tensors.
#ifdef MMFUSE_CUDA_ON_CPU
#define MMFUSE_CUDA_KEY CPU
#else
#define MMFUSE_CUDA_KEY CUDA
// PyTorch's CPU wheels leave this declaration out of shim.h.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
#endif

namespace mmfuse::cuda {

// Makes the tensor's device current for as long as it lives, and knows that device's stream.
class C10_HIDDEN DeviceScope {
 public:
#ifdef MMFUSE_CUDA_ON_CPU
  explicit DeviceScope(const Tensor&) {}
#else
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  cudaStream_t stream() const { return stream_; }

 private:
#ifndef MMFUSE_CUDA_ON_CPU
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

// float32 or float64 values, one for each of `count` tensors.
inline Coefficients coefficients_of(const Tensor& tensor, size_t count, const char* name) {
  const DType dtype = dtype_of(tensor);
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == static_cast<int64_t>(count) &&
                      (dtype == DType::kFloat32 || dtype == DType::kFloat64),
                  "mmfuse: ", name, " must be float32 or float64, contiguous, with ", count,
                  " elements");
  return {tensor.const_data_ptr(), dtype == DType::kFloat64};
}

// A NoiseStream's (seed, step).
inline const int64_t* noise_state_of(const std::optional<Tensor>& state) {
  STD_TORCH_CHECK(state.has_value(), "mmfuse: noise_state is missing");
  return indices_of(*state, 2, "noise_state");
}

// The list that a kernel works on.
inline std::vector<GradTensor> grad_tensors(const TensorList& grads, const TensorList& params,
                                            const TensorList& anchors, bool writes_grads) {
  check_pairs(grads, params, anchors);
  const std::vector<RowOrder> orders = row_orders(grads, params, anchors);
  std::vector<GradTensor> tensors(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    GradTensor& tensor = tensors[t];
    tensor.grad =
        writes_grads ? grads[t].mutable_data_ptr() : const_cast<void*>(grads[t].const_data_ptr());
    tensor.numel = grads[t].numel();
    tensor.slot = static_cast<int32_t>(t);
    tensor.grad_dtype = dtype_of(grads[t]);
    tensor.channels = static_cast<int32_t>(orders[t].channels);
    tensor.spatial = static_cast<int32_t>(orders[t].spatial);
    if (params.empty()) continue;
    tensor.param = params[t].const_data_ptr();
    tensor.param_dtype = dtype_of(params[t]);
    if (anchors.empty()) continue;
    tensor.anchor = anchors[t].const_data_ptr();
    tensor.anchor_dtype = dtype_of(anchors[t]);
  }
  return tensors;
}

inline std::vector<GradTensor> grad_tensors(const Rows& rows, bool paired) {
  std::vector<GradTensor> tensors(rows.size());
  for (size_t t = 0; t < rows.size(); ++t) {
    GradTensor& tensor = tensors[t];
    tensor.grad = rows[t].pointer();
    tensor.numel = rows[t].numel;
    tensor.noise_id = static_cast<uint32_t>(rows[t].id);
    tensor.slot = static_cast<int32_t>(t);
    tensor.grad_dtype = rows[t].type();
    tensor.channels = static_cast<int32_t>(rows[t].channels);
    tensor.spatial = static_cast<int32_t>(rows[t].spatial);
    if (!paired) continue;
    tensor.param = rows[t].param_pointer();
    tensor.param_dtype = rows[t].param_type();
    tensor.anchor = rows[t].anchor_pointer();
    tensor.anchor_dtype = rows[t].anchor_type();
  }
  return tensors;
}

}  // namespace mmfuse::cuda
