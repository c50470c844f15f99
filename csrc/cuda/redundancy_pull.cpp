#include "redundancy_pull.h"

#include "glue/cuda_tensors.h"
#include "glue/redundancy.h"

namespace mmfuse::cuda {

RedundancyResults redundancy_pull(const Tensor& scores, const std::optional<Tensor>& redundancy,
                                  const Tensor& gate, const Tensor& history, const Tensor& steps,
                                  const Tensor& last, const Tensor& average, const Tensor& weight,
                                  const Tensor& owner, const std::optional<Tensor>& numel,
                                  const std::optional<Tensor>& mean,
                                  const std::optional<Tensor>& m2, const std::optional<Tensor>& dot,
                                  double momentum, double gamma, double beta, double threshold,
                                  bool unbiased, bool by_encoder) {
  RedundancyPullParams call{};
  const bool given = check_redundancy(scores, history, {numel, mean, m2, dot});
  const int64_t modalities = call.modalities = scores.size(0);
  const size_t count = static_cast<size_t>(modalities);
  call.scores = coefficients_of(scores, static_cast<size_t>(scores.numel()), "scores");
  call.table = scores.dim() == 2;
  if (redundancy) call.measured = coefficients_of(*redundancy, count, "redundancy");
  call.gate = coefficients_of(gate, 1, "gate");
  call.columns = history.size(1);
  call.history = doubles_of(history, modalities * call.columns, "history");
  call.steps = indices_of(steps, modalities, "steps");
  call.old = {doubles_of(last, modalities, "redundancy"),
              doubles_of(average, modalities, "average"), doubles_of(weight, modalities, "weight")};
  call.owner = indices_of(owner, owner.numel(), "owner");
  if (given) {
    call.tensors = owner.numel();
    const size_t tensors = static_cast<size_t>(call.tensors);
    call.numel = indices_of(*numel, call.tensors, "numel");
    call.mean = coefficients_of(*mean, tensors, "mean");
    call.m2 = coefficients_of(*m2, tensors, "m2");
    call.dot = coefficients_of(*dot, tensors, "dot");
  }
  call.rule = {momentum, gamma, beta, threshold, unbiased};
  call.by_encoder = by_encoder;
  const DeviceScope device(scores);
  const ScalarType like = given ? dot->scalar_type() : scores.scalar_type();
  const auto vector = [&] { return new_empty(scores, {modalities}, ScalarType::Double); };
  const auto writable = [](Tensor& tensor) {
    return static_cast<double*>(tensor.mutable_data_ptr());
  };
  Tensor coefficients = new_empty(scores, {modalities}, scores.scalar_type());
  Tensor growth = vector();
  Tensor phase = vector();
  Tensor later = new_empty(scores, {modalities, call.columns}, ScalarType::Double);
  Tensor counted = new_empty(scores, {modalities}, ScalarType::Long);
  Tensor last_now = vector();
  Tensor average_now = vector();
  Tensor weight_now = vector();
  Tensor scale = new_empty(scores, {call.tensors}, like);
  Tensor pull = new_empty(scores, {call.tensors}, like);
  call.coefficients = coefficients.mutable_data_ptr();
  call.growth = writable(growth);
  call.phase = writable(phase);
  call.later = writable(later);
  call.counted = static_cast<int64_t*>(counted.mutable_data_ptr());
  call.last = writable(last_now);
  call.average = writable(average_now);
  call.weight = writable(weight_now);
  call.scale = scale.mutable_data_ptr();
  call.pull = pull.mutable_data_ptr();
  launch_redundancy_pull(call, device.stream());
  return {coefficients, growth,      phase,      later, counted,
          last_now,     average_now, weight_now, scale, pull};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("redundancy_pull.cuda", TORCH_BOX(&mmfuse::cuda::redundancy_pull));
}
