#include "logit_divergence.h"

#include "glue/cuda_tensors.h"

namespace mmfuse::cuda {
namespace {

std::vector<LogitPair> checked_pairs(const TensorList& first, const TensorList& second,
                                     int64_t kind) {
  STD_TORCH_CHECK(!first.empty() && first.size() == second.size() && kind >= 0 && kind <= 2,
                  "mmfuse: first and second must be lists of one length, and the kind 0, 1 or 2");
  const int64_t rows = first[0].size(0);
  std::vector<LogitPair> pairs;
  for (size_t k = 0; k < first.size(); ++k) {
    const Tensor &a = first[k], &b = second[k];
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == rows && b.size(0) == rows &&
                        a.size(1) == b.size(1) && a.size(1) > 1 &&
                        a.scalar_type() == b.scalar_type() && a.stride(1) == 1 && b.stride(1) == 1,
                    "mmfuse: logits must be [B, C], pairs of one shape and dtype, with classes "
                    "that adjoin in memory");
    STD_TORCH_CHECK(a.size(1) <= kMaxPairClasses, "mmfuse: too many classes");
    pairs.push_back({a.const_data_ptr(), b.const_data_ptr(), nullptr, nullptr, a.stride(0),
                     b.stride(0), static_cast<int32_t>(a.size(1)), dtype_of(a)});
  }
  return pairs;
}

}  // namespace

std::tuple<Tensor, Tensor> logit_divergence(const TensorList& first, const TensorList& second,
                                            int64_t kind, bool per_row) {
  LogitDivergenceParams call;
  call.pairs = checked_pairs(first, second, kind);
  const DeviceScope device(first[0]);
  const int64_t count = static_cast<int64_t>(first.size()), rows = first[0].size(0);
  const ScalarType dtype = result_type(first);
  Tensor value =
      per_row ? new_empty(first[0], {count, rows}, dtype) : new_empty(first[0], {count}, dtype);
  Tensor numbers = new_empty(first[0], {count, kRowNumbers, rows}, dtype);
  Tensor workspace =
      new_empty(first[0], {per_row ? 0 : count * divergence_blocks(rows)}, ScalarType::Double);
  call.kind = static_cast<DivergenceKind>(kind);
  call.rows = rows;
  call.per_row = per_row;
  call.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  call.value = value.mutable_data_ptr();
  call.numbers = numbers.mutable_data_ptr();
  call.wide = dtype == ScalarType::Double;
  launch_logit_divergence(call, device.stream());
  return {value, numbers};
}

TensorList logit_divergence_backward(const Tensor& grad, const Tensor& numbers,
                                     const TensorList& first, const TensorList& second,
                                     int64_t kind, bool to_first, bool to_second) {
  LogitDivergenceBackwardParams call;
  call.pairs = checked_pairs(first, second, kind);
  const size_t count = first.size();
  call.kind = static_cast<DivergenceKind>(kind);
  call.rows = first[0].size(0);
  call.per_row = grad.dim() == 2;
  call.grad = coefficients_of(grad, call.per_row ? count * call.rows : count, "grad");
  call.numbers = coefficients_of(numbers, count * kRowNumbers * call.rows, "rows");
  const DeviceScope device(first[0]);
  TensorList grads;
  const auto add = [&](const Tensor& like) {
    Tensor made = new_empty(like, {call.rows, like.size(1)}, like.scalar_type());
    return grads.emplace_back(made).mutable_data_ptr();
  };
  for (size_t k = 0; k < count && to_first; ++k) call.pairs[k].grad_first = add(first[k]);
  for (size_t k = 0; k < count && to_second; ++k) call.pairs[k].grad_second = add(second[k]);
  if (!grads.empty()) launch_logit_divergence_backward(call, device.stream());
  return grads;
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("logit_divergence.cuda", TORCH_BOX(&mmfuse::cuda::logit_divergence));
  m.impl("logit_divergence_backward.cuda", TORCH_BOX(&mmfuse::cuda::logit_divergence_backward));
}
