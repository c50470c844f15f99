#include "modality_scores.h"

#include "glue/cuda_tensors.h"
#include "glue/score_rows.h"

namespace mmfuse::cuda {
namespace {

RowStrides strides_of(const RowLayout& layout) {
  return {layout.outer_stride, layout.class_stride, layout.inner_stride};
}

std::vector<ModalityLogits> modality_logits(const TensorList& logits,
                                            const std::vector<RowLayout>& layouts) {
  std::vector<ModalityLogits> modalities(logits.size());
  for (size_t m = 0; m < logits.size(); ++m) {
    const RowLayout& layout = layouts[m];
    STD_TORCH_CHECK(layout.classes <= kMaxClasses, "mmfuse: too many classes");
    modalities[m].logits = logits[m].const_data_ptr();
    modalities[m].strides = strides_of(layout);
    modalities[m].classes = static_cast<int32_t>(layout.classes);
    modalities[m].dtype = dtype_of(logits[m]);
    modalities[m].classes_adjoin = layout.classes_adjoin;
  }
  return modalities;
}

const double* numbers_of(const std::optional<Tensor>& weight) {
  return weight.has_value() ? static_cast<const double*>(weight->const_data_ptr()) : nullptr;
}

// Sets what all three calls have in common.
template <typename params_t>
void set_inputs(params_t& call, const TensorList& logits, const Tensor& labels,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& pos_weight,
                int64_t ignore_index, bool multilabel) {
  const std::vector<RowLayout> layouts =
      checked_layouts(logits, labels, weight, pos_weight, multilabel);
  call.modalities = modality_logits(logits, layouts);
  const RowLayout& layout = layouts[0];
  ScoreTargets& targets = call.targets;
  targets = {};
  targets.values = labels.const_data_ptr();
  targets.kind = TargetKind::kIndices;
  if (labels.scalar_type() != ScalarType::Long) {
    targets.kind = multilabel ? TargetKind::kLabels : TargetKind::kShares;
    targets.dtype = dtype_of(labels);
    targets.strides = strides_of(row_layout(labels));
  }
  targets.weight = numbers_of(weight);
  targets.pos_weight = numbers_of(pos_weight);
  targets.ignore_index = ignore_index;
  targets.rows = layout.outer * layout.inner;
  targets.inner = layout.inner;
}

using LaunchMeans = void (*)(const ModalityScoresParams&, cudaStream_t);

// Two means [M] of this type, and the sum of the rows' weights.
std::tuple<Tensor, Tensor, Tensor> means_of(ModalityScoresParams& call, LaunchMeans launch,
                                            const TensorList& logits, const Tensor& labels,
                                            ScalarType dtype) {
  call.widest = static_cast<int>(widest(logits));
  const DeviceScope device(labels);
  const int64_t count = static_cast<int64_t>(logits.size());
  Tensor first = new_empty(labels, {count}, dtype);
  Tensor second = new_empty(labels, {count}, dtype);
  Tensor total = new_empty(labels, {}, ScalarType::Double);
  Tensor workspace =
      new_empty(labels, {count, score_blocks(call.targets.rows), kScoreSums}, ScalarType::Double);
  call.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  call.prob = first.mutable_data_ptr();
  call.log_prob = second.mutable_data_ptr();
  call.count = static_cast<double*>(total.mutable_data_ptr());
  call.wide = dtype == ScalarType::Double;
  launch(call, device.stream());
  return {first, second, total};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> modality_scores(const TensorList& logits, const Tensor& labels,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& pos_weight,
                                                   int64_t ignore_index, bool multilabel) {
  ModalityScoresParams call;
  set_inputs(call, logits, labels, weight, pos_weight, ignore_index, multilabel);
  return means_of(call, launch_modality_scores, logits, labels, result_type(logits));
}

// Of class indices the weighted share of rows that are right, and prob.
std::tuple<Tensor, Tensor, Tensor> modality_accuracies(const TensorList& logits,
                                                       const Tensor& labels,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& pos_weight,
                                                       int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "mmfuse: labels must be int64");
  ModalityScoresParams call;
  set_inputs(call, logits, labels, weight, pos_weight, ignore_index, multilabel);
  return means_of(call, launch_modality_accuracies, logits, labels, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> sample_scores(const TensorList& logits, const Tensor& labels,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& pos_weight,
                                                 int64_t ignore_index, bool multilabel) {
  SampleScoresParams call;
  set_inputs(call, logits, labels, weight, pos_weight, ignore_index, multilabel);
  call.widest = static_cast<int>(widest(logits));
  const DeviceScope device(labels);
  const std::vector<int64_t> shape = shape_of_rows(labels);
  std::vector<int64_t> each{static_cast<int64_t>(logits.size())};
  each.insert(each.end(), shape.begin(), shape.end());
  const ScalarType dtype = result_type(logits);
  Tensor prob = torch::stable::new_empty(labels, each, dtype);
  Tensor log_prob = torch::stable::new_empty(labels, each, dtype);
  Tensor weights = torch::stable::new_empty(labels, shape, ScalarType::Double);
  call.prob = prob.mutable_data_ptr();
  call.log_prob = log_prob.mutable_data_ptr();
  call.weights = static_cast<double*>(weights.mutable_data_ptr());
  call.wide = dtype == ScalarType::Double;
  launch_sample_scores(call, device.stream());
  return {prob, log_prob, weights};
}

// prob, log_prob, weights, and of class indices correct, entropy, log_sum_exp, abs_sum.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_statistics(
    const TensorList& logits, const Tensor& labels, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& pos_weight, int64_t ignore_index, bool multilabel) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "mmfuse: labels must be int64");
  SampleStatisticsParams call;
  set_inputs(call.scores, logits, labels, weight, pos_weight, ignore_index, multilabel);
  call.scores.widest = static_cast<int>(widest(logits));
  const DeviceScope device(labels);
  std::vector<int64_t> each{static_cast<int64_t>(logits.size())};
  for (const int64_t size : shape_of_rows(labels)) each.push_back(size);
  const ScalarType dtype = result_type(logits);
  const auto make = [&](ScalarType of) { return torch::stable::new_empty(labels, each, of); };
  Tensor prob = make(dtype), log_prob = make(dtype), correct = make(ScalarType::Bool);
  Tensor entropy = make(dtype), log_sum_exp = make(dtype), abs_sum = make(dtype);
  Tensor weights = torch::stable::new_empty(labels, shape_of_rows(labels), ScalarType::Double);
  call.scores.prob = prob.mutable_data_ptr();
  call.scores.log_prob = log_prob.mutable_data_ptr();
  call.scores.weights = static_cast<double*>(weights.mutable_data_ptr());
  call.scores.wide = dtype == ScalarType::Double;
  call.correct = static_cast<bool*>(correct.mutable_data_ptr());
  call.entropy = entropy.mutable_data_ptr();
  call.log_sum_exp = log_sum_exp.mutable_data_ptr();
  call.abs_sum = abs_sum.mutable_data_ptr();
  launch_sample_statistics(call, device.stream());
  return {prob, log_prob, weights, correct, entropy, log_sum_exp, abs_sum};
}

TensorList modality_scores_backward(const Tensor& grad_prob, const Tensor& grad_log_prob,
                                    const Tensor& count, const TensorList& logits,
                                    const Tensor& labels, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& pos_weight, int64_t ignore_index,
                                    bool multilabel) {
  ModalityScoresBackwardParams call;
  set_inputs(call, logits, labels, weight, pos_weight, ignore_index, multilabel);
  call.grad_prob = coefficients_of(grad_prob, logits.size(), "grad_prob");
  call.grad_log_prob = coefficients_of(grad_log_prob, logits.size(), "grad_log_prob");
  STD_TORCH_CHECK(count.numel() == 1 && count.scalar_type() == ScalarType::Double,
                  "mmfuse: count must be one float64");
  call.count = static_cast<const double*>(count.const_data_ptr());
  const DeviceScope device(labels);
  TensorList grads;
  for (size_t m = 0; m < logits.size(); ++m) {
    grads.push_back(torch::stable::empty_like(logits[m]));
    const RowLayout layout = row_layout(grads[m]);
    STD_TORCH_CHECK(layout.classes_adjoin == call.modalities[m].classes_adjoin,
                    "mmfuse: the gradient would lie in another order than its logits");
    call.modalities[m].grad = grads[m].mutable_data_ptr();
    call.modalities[m].grad_strides = strides_of(layout);
  }
  launch_modality_scores_backward(call, device.stream());
  return grads;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("modality_scores.cuda", TORCH_BOX(&mmfuse::cuda::modality_scores));
  m.impl("modality_scores_backward.cuda", TORCH_BOX(&mmfuse::cuda::modality_scores_backward));
  m.impl("modality_accuracies.cuda", TORCH_BOX(&mmfuse::cuda::modality_accuracies));
  m.impl("sample_statistics.cuda", TORCH_BOX(&mmfuse::cuda::sample_statistics));
  m.impl("sample_scores.cuda", TORCH_BOX(&mmfuse::cuda::sample_scores));
}
