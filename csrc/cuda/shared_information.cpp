#include "shared_information.h"

#include "glue/cuda_tensors.h"
#include "joint_entropies.h"

namespace mmfuse::cuda {
namespace {

// Histograms of the tuples, with all that their launch needs; a later call may have the ranges.
struct Tables {
  JointEntropiesParams call{};
  bool whole;
  Tensor entropies;
  Tensor counts;

  Tables(const Tensor& first, const std::vector<const void*>& data, std::vector<int64_t> tuples,
         int order, int bins)
      : entropies(first), counts(first) {
    const int64_t rows = static_cast<int64_t>(tuples.size()) / order;
    const int64_t cells = int64_t{bins} * bins * (order == 3 ? bins : 1);
    call.data = data;
    call.tuples = std::move(tuples);
    call.order = order;
    call.bins = bins;
    call.problems = first.size(0);
    call.columns = first.size(1);
    call.dtype = dtype_of(first);
    whole = block_per_problem(call);
    entropies =
        new_empty(first, {rows, call.problems, (int64_t{1} << order) - 1}, ScalarType::Double);
    counts = new_empty(first, {rows, call.problems, cells}, ScalarType::Long);
    if (!whole) torch::stable::zero_(counts);
    call.entropies = static_cast<double*>(entropies.mutable_data_ptr());
    call.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  }
};

}  // namespace

std::tuple<Tensor, Tensor> shared_information(const TensorList& data, int64_t bins,
                                              int64_t conditional_bins) {
  STD_TORCH_CHECK(data.size() >= 2 && bins >= 1 && bins <= 256 && conditional_bins >= 1 &&
                      conditional_bins <= 32,
                  "mmfuse: shared_information needs two tensors, and at most 256 and 32 bins");
  check_contiguous(data, "the variables");
  const Tensor& first = data[0];
  std::vector<const void*> pointers;
  for (const Tensor& x : data) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == first.size(0) && x.size(1) == first.size(1) &&
                        x.scalar_type() == first.scalar_type(),
                    "mmfuse: the variables must be [P, N], of one shape and one dtype");
    pointers.push_back(x.const_data_ptr());
  }
  const DeviceScope device(first);
  const int64_t count = static_cast<int64_t>(data.size()) - 1, problems = first.size(0);
  std::vector<int64_t> pairs, triples;
  for (int64_t m = 0; m < count; ++m) {
    pairs.insert(pairs.end(), {m, count});
    for (int64_t j = m + 1; j < count; ++j) triples.insert(triples.end(), {m, j, count});
  }
  Tables alone(first, pointers, std::move(pairs), 2, static_cast<int>(bins));
  Tables given(first, pointers, std::move(triples), 3, static_cast<int>(conditional_bins));
  std::optional<Tensor> ranges;
  if (!alone.whole || !given.whole) {
    const int64_t columns = first.size(1);
    const int64_t parts = chunk_count(columns, range_chunk(columns));
    ranges = new_empty(first, {count + 1, problems, parts, 2}, ScalarType::Double);
    alone.call.ranges = given.call.ranges = static_cast<double*>(ranges->mutable_data_ptr());
  }
  given.call.ranges_found = !alone.whole;
  launch_joint_entropies(alone.call, device.stream());
  launch_joint_entropies(given.call, device.stream());
  Tensor nmi = new_empty(first, {count, problems}, ScalarType::Double);
  Tensor ncmi = new_empty(first, {count, count, problems}, ScalarType::Double);
  SharedInformationParams params{};
  params.variables = count;
  params.problems = problems;
  params.pairs = alone.call.entropies;
  params.triples = given.call.entropies;
  params.nmi = static_cast<double*>(nmi.mutable_data_ptr());
  params.ncmi = static_cast<double*>(ncmi.mutable_data_ptr());
  launch_shared_information(params, device.stream());
  return {nmi, ncmi};
}

}  // namespace mmfuse::cuda

STABLE_TORCH_LIBRARY_IMPL(mmfuse, MMFUSE_CUDA_KEY, m) {
  m.impl("shared_information.cuda", TORCH_BOX(&mmfuse::cuda::shared_information));
}
