#include "drop_modalities.h"

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/drop_modalities_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// A row's cost to draw for, and once more to copy or not; a byte's cost.
constexpr Nanoseconds kRow = ns(0.5);
constexpr Nanoseconds kByte = ns(0.015);
// Elements of a chunk at most. The outputs are fresh memory: threads that touch the same megabytes
// of it for the first time wait for each other.
constexpr int64_t kLongChunk = 1 << 20;

int64_t batch_of(const TensorList& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "mmfuse: there must be at least one modality");
  check_contiguous(tensors, "features and gradients");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == tensors[0].size(0),
                    "mmfuse: features and gradients must be [B, ...] with one B");
  }
  return tensors[0].size(0);
}

}  // namespace

TensorList drop_modalities_backward(const TensorList& grads, const Tensor& keep,
                                    const std::optional<Tensor>& scale) {
  const int64_t rows = batch_of(grads);
  const int64_t count = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(keep.is_contiguous() && keep.scalar_type() == ScalarType::Bool &&
                      keep.numel() == count * rows,
                  "mmfuse: keep must be bool, contiguous, [M, B]");
  const bool* kept = static_cast<const bool*>(keep.const_data_ptr());
  const double factor = scale ? Coefficients(*scale, 1, "scale")[0] : 1;
  TensorList out;
  std::vector<DropSlice> slices;
  out.reserve(count);
  slices.reserve(count);
  Nanoseconds cost = count * rows * kRow;
  int64_t total = 0;
  for (int64_t m = 0; m < count; ++m) {
    out.push_back(torch::stable::empty_like(grads[m]));
    const int64_t size = grads[m].numel();
    slices.push_back({dtype_of(grads[m]), grads[m].const_data_ptr(), out[m].mutable_data_ptr(),
                      kept + m * rows, size / std::max<int64_t>(1, rows), factor, 0, size});
    cost = cost + size * element_size(slices[m].dtype) * kByte;
    total += size;
  }
  const auto kernel = MMFUSE_SIMD_SELECT(drop_slice);
  const int64_t fair = total / (2 * threads_for(cost));
  const int64_t step = std::clamp(fair, kChunk, kLongChunk);
  const auto& chunks = make_chunks(slices, [&](const DropSlice&) { return step; });
  parallel_each(chunks, cost, [&](const Chunk& chunk, size_t) {
    DropSlice slice = slices[chunk.tensor];
    slice.begin = chunk.begin;
    slice.size = chunk.size;
    kernel(slice);
  });
  return out;
}

std::tuple<TensorList, Tensor> drop_modalities(const TensorList& features, const Tensor& q,
                                               const Tensor& noise_state,
                                               const std::vector<int64_t>& noise_ids,
                                               const std::vector<int64_t>& noise_offsets,
                                               const std::optional<Tensor>& scale) {
  const int64_t rows = batch_of(features);
  const int64_t count = static_cast<int64_t>(features.size());
  STD_TORCH_CHECK(noise_ids.size() == features.size() && noise_offsets.size() == features.size(),
                  "mmfuse: each modality needs a noise_id and a noise_offset");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float, "mmfuse: q must be float32");
  const Coefficients probabilities(q, features.size(), "q");
  const int64_t* state = noise_state_of(noise_state);
  Tensor keep = empty_on_cpu({count, rows}, ScalarType::Bool);
  bool* kept = static_cast<bool*>(keep.mutable_data_ptr());
  const auto kernel = MMFUSE_SIMD_SELECT(draw_keep);
  const int64_t steps = (rows + kChunk - 1) / kChunk;
  parallel_each(count * steps, count * rows * kRow, [&](int64_t i) {
    const int64_t m = i / steps, begin = i % steps * kChunk;
    kernel({noise_key(state, noise_ids[m]), noise_offsets[m], static_cast<float>(probabilities[m]),
            kept + m * rows, begin, std::min(rows, begin + kChunk)});
  });
  return {drop_modalities_backward(features, keep, scale), keep};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("drop_modalities.cpu", TORCH_BOX(&mmfuse::cpu::drop_modalities));
  m.impl("drop_modalities_backward.cpu", TORCH_BOX(&mmfuse::cpu::drop_modalities_backward));
}
