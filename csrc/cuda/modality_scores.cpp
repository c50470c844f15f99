#include "modality_scores.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

const int64_t* labels_of(const Tensor& labels) {
  STD_TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == ScalarType::Long,
                  "mmfuse: labels must be int64 and contiguous");
  return static_cast<const int64_t*>(labels.const_data_ptr());
}

std::vector<ModalityLogits> modality_logits(const TensorList& logits, const Tensor& labels) {
  check_contiguous(logits, "logits");
  std::vector<ModalityLogits> modalities(logits.size());
  for (size_t m = 0; m < logits.size(); ++m) {
    const Tensor& tensor = logits[m];
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == labels.numel() && tensor.size(1) <= kMaxClasses,
        "mmfuse: logits must have shape [B, C], with B labels");
    modalities[m] = {tensor.const_data_ptr(), nullptr, static_cast<int32_t>(tensor.size(1)),
                     dtype_of(tensor)};
  }
  return modalities;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> modality_scores(const TensorList& logits, const Tensor& labels,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& pos_weight,
                                                   int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(!weight && !pos_weight && ignore_index == -100 && !multilabel,
                  "mmfuse: class indices only");
  ModalityScoresParams call;
  call.modalities = modality_logits(logits, labels);
  call.labels = labels_of(labels);
  call.rows = labels.numel();
  const DeviceScope device(labels);
  const int64_t count = static_cast<int64_t>(logits.size());
  const ScalarType dtype = result_type(logits);
  Tensor prob = new_empty(labels, {count}, dtype);
  Tensor log_prob = new_empty(labels, {count}, dtype);
  Tensor workspace =
      new_empty(labels, {count, score_blocks(call.rows), kScoreSums}, ScalarType::Double);
  call.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  call.prob = prob.mutable_data_ptr();
  call.log_prob = log_prob.mutable_data_ptr();
  call.wide = dtype == ScalarType::Double;
  launch_modality_scores(call, device.stream());
  Tensor total = new_empty(labels, {}, ScalarType::Double);
  return {prob, log_prob, total};
}

TensorList modality_scores_backward(const Tensor& grad_prob, const Tensor& grad_log_prob,
                                    const Tensor&, const TensorList& logits,
                                    const Tensor& labels, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& pos_weight, int64_t ignore_index,
                                    bool multilabel) {
  STD_TORCH_CHECK(!weight && !pos_weight && ignore_index == -100 && !multilabel,
                  "mmfuse: class indices only");
  ModalityScoresBackwardParams call;
  call.modalities = modality_logits(logits, labels);
  call.labels = labels_of(labels);
  call.rows = labels.numel();
  call.grad_prob = coefficients_of(grad_prob, logits.size(), "grad_prob");
  call.grad_log_prob = coefficients_of(grad_log_prob, logits.size(), "grad_log_prob");
  const DeviceScope device(labels);
  TensorList grads;
  for (size_t m = 0; m < logits.size(); ++m) {
    grads.push_back(torch::stable::empty_like(logits[m]));
    call.modalities[m].grad = grads[m].mutable_data_ptr();
  }
  launch_modality_scores_backward(call, device.stream());
  return grads;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("modality_scores.cuda", TORCH_BOX(&mmfuse::cuda::modality_scores));
  m.impl("modality_scores_backward.cuda", TORCH_BOX(&mmfuse::cuda::modality_scores_backward));
}
