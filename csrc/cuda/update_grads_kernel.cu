#include "launch.h"
#include "update_grads.h"
#include "update_tensor.h"

namespace mmfuse::cuda {
namespace {

// As many as the registers allow.
template <Anchors kAnchors, bool kNoise>
constexpr int kBlocksPerSm = kAnchors == Anchors::kNone ? (kNoise ? 4 : 5) : (kNoise ? 3 : 4);

template <bool kHasAnchors, bool kNoise>
using UpdateTable = TensorTable<Entry<kHasAnchors, kNoise>, UpdateCommon>;

// One block per chunk, from the last to the first: what grad_stats read last is still in the cache.
template <typename scalar_t, Anchors kAnchors, bool kNoise>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<kAnchors, kNoise>)) update_grads_kernel(
    const UpdateTable<kAnchors != Anchors::kNone, kNoise> __grid_constant__ table) {
  using acc_t = acc_type<scalar_t>;
  const UpdateCommon& call = table.common;
  const int chunk = table.chunks - 1 - static_cast<int>(blockIdx.x);
  const auto& entry = table.entries[find_entry(table, chunk)];
  TensorUpdate<scalar_t> tensor{};
  tensor.in = static_cast<const scalar_t*>(entry.grad);
  tensor.out = static_cast<scalar_t*>(entry.grad);
  tensor.numel = entry.numel;
  tensor.scale = load_coefficient<acc_t>(call.scale, entry.slot);
  if constexpr (kAnchors != Anchors::kNone) {
    tensor.pull = load_coefficient<acc_t>(call.pull, entry.slot);
    tensor.pair = anchor_pair<kAnchors>(entry);
  }
  if constexpr (kNoise) {
    tensor.noise_std = load_coefficient<acc_t>(call.noise_std, entry.slot);
    tensor.key = load_noise_key(call.noise_state, entry.noise_id);
    tensor.noise_offset = entry.noise_offset;
  }
  tensor.store =
      tensor.scale != acc_t(1) || tensor.pull != acc_t(0) || tensor.noise_std != acc_t(0);
  if (!tensor.store && call.finite == nullptr) return;
  const bool finite = update_chunk<kAnchors, kNoise>(tensor, chunk - entry.first_chunk);
  if (!finite && call.finite != nullptr) *call.finite = false;
}

template <typename scalar_t, Anchors kAnchors, bool kNoise>
void launch_group(const UpdateGradsParams& params, cudaStream_t stream) {
  constexpr bool kHasAnchors = kAnchors != Anchors::kNone;
  UpdateTable<kHasAnchors, kNoise> table;
  table.common = params.common;
  for_each_table<kHasAnchors, kNoise>(
      params.tensors, kDType<scalar_t>, kAnchors, kUpdateChunk, table, [&] {
        launch("update_grads_kernel", update_grads_kernel<scalar_t, kAnchors, kNoise>, table.chunks,
               kThreads, stream, table);
      });
}

}  // namespace

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream) {
  const bool has_noise = params.common.noise_std.values != nullptr;
  const bool has_anchors = params.common.pull.values != nullptr;
  visit_groups(params.tensors, has_anchors, [&](auto* type, auto anchors) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (has_noise) {
      launch_group<scalar_t, anchors.value, true>(params, stream);
    } else {
      launch_group<scalar_t, anchors.value, false>(params, stream);
    }
  });
}

}  // namespace mmfuse::cuda
