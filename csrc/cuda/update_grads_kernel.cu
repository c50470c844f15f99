#include <algorithm>
#include <type_traits>

#include "cuda/device/flag.h"
#include "cuda/device/launch.h"
#include "cuda/device/reduce.h"
#include "cuda/device/transposed_update.h"
#include "cuda/device/update_tensor.h"
#include "update_grads.h"

namespace mmfuse::cuda {
namespace {

// Threads of a block, as many as the registers allow.
template <typename scalar_t, Anchors kAnchors, bool kNoise>
constexpr int kBlocksPerSm = kAnchors == Anchors::kNone ? (kNoise || sizeof(scalar_t) == 8 ? 4 : 5)
                             : kAnchors == Anchors::kMixed ? (kNoise ? 2 : 4)
                                                           : (kNoise ? 3 : 4);

constexpr int kSumThreads = 256;

// Tensors of a long table of sums; a short one has kShortList.
constexpr int kLongSums = 2000;

template <Anchors kAnchors, bool kNoise, bool kShort>
using UpdateTable = GradTable<kAnchors != Anchors::kNone, kNoise, UpdateCommon, kShort>;

// Facts of a tensor, from its entry and the call.
template <typename scalar_t, Anchors kAnchors, bool kNoise, typename entry_t>
__device__ __forceinline__ TensorUpdate<scalar_t> load_update(const UpdateCommon& call,
                                                              const entry_t& entry) {
  using acc_t = acc_type<scalar_t>;
  TensorUpdate<scalar_t> tensor{};
  tensor.in = static_cast<const scalar_t*>(entry.grad);
  tensor.out = static_cast<scalar_t*>(entry.grad);
  tensor.numel = entry.numel;
  if constexpr (kNoise) tensor.key = load_noise_key(call.noise_state, entry.noise_id);
  tensor.scale = load_coefficient<acc_t>(call.scale, entry.slot);
  if constexpr (kAnchors != Anchors::kNone) {
    tensor.pull = load_coefficient<acc_t>(call.pull, entry.slot);
    tensor.pair = anchor_pair<kAnchors>(entry);
  }
  if constexpr (kNoise) {
    tensor.noise_std = load_coefficient<acc_t>(call.noise_std, entry.slot);
    tensor.noise_offset = entry.noise_offset;
  }
  tensor.store =
      tensor.scale != acc_t(1) || tensor.pull != acc_t(0) || tensor.noise_std != acc_t(0);
  return tensor;
}

__device__ __forceinline__ void advance_step(int64_t* step, const bool* finite) {
  if (*finite) ++*step;
}

// The step that every block has read becomes the next one once all blocks are done.
__device__ __forceinline__ void advance_at_last(const UpdateCommon& call) {
  if (call.done == nullptr || !is_last_block(call.done, call.blocks)) return;
  advance_step(call.step, call.finite);
}

// One block per chunk, from the last to the first: what grad_stats read last is still in the cache.
template <typename scalar_t, Anchors kAnchors, bool kNoise, bool kShort>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<scalar_t, kAnchors, kNoise>))
    update_grads_kernel(const UpdateTable<kAnchors, kNoise, kShort> __grid_constant__ table) {
  const UpdateCommon& call = table.common;
  const int chunk = table.chunks - 1 - static_cast<int>(blockIdx.x);
  const int found = find_entry(table, chunk);
  const auto& entry = table.entries[found];
  const auto tensor = load_update<scalar_t, kAnchors, kNoise>(call, entry);
  if (!tensor.store && call.finite == nullptr) return;
  const bool finite = update_chunk<kAnchors, kNoise>(tensor, chunk - table.first_chunk[found]);
  if (!finite && call.finite != nullptr) set_flag(call.finite, false);
  if constexpr (kNoise) advance_at_last(call);
}

// Short ones alone: a longer list has more launches, not a second kernel.
template <Anchors kAnchors>
using TransposedTable = ListTable<TransposedEntry<kAnchors != Anchors::kNone>, UpdateCommon, true>;

// A batch's registers are 16 gradients, and as many displacements.
template <typename scalar_t, Anchors kAnchors>
constexpr int kTransposedBlocksPerSm = sizeof(scalar_t) == 8 || kAnchors != Anchors::kNone ? 2 : 4;

// As update_grads_kernel with noise, for tensors in channels_last. A kernel of its own, so that the
// other one stays as it was tuned.
template <typename scalar_t, Anchors kAnchors>
__global__ void __launch_bounds__(kThreads, (kTransposedBlocksPerSm<scalar_t, kAnchors>))
    update_grads_transposed_kernel(const TransposedTable<kAnchors> __grid_constant__ table) {
  alignas(kVectorBytes) __shared__ float normals[kTransposedTile + kNoiseBlock];
  const UpdateCommon& call = table.common;
  const int chunk = table.chunks - 1 - static_cast<int>(blockIdx.x);
  const int found = find_entry(table, chunk);
  const auto& entry = table.entries[found];
  const auto tensor = load_update<scalar_t, kAnchors, true>(call, entry);
  if (!tensor.store && call.finite == nullptr) return;
  const bool finite = update_transposed<kAnchors>(tensor, entry.channels, entry.spatial,
                                                  chunk - table.first_chunk[found], normals);
  if (!finite && call.finite != nullptr) set_flag(call.finite, false);
  advance_at_last(call);
}

// Shared by all tensors of a call with sums.
struct SquaresCommon {
  Coefficients scale;  // a null pointer stands for 1, where the sums are formed alone
  Coefficients pull;
  bool* finite;
  double* partials;  // of the table's chunks
};

// The sum takes two more registers where it is float64.
template <typename scalar_t, Anchors kAnchors>
constexpr int kSquaresBlocksPerSm =
    kBlocksPerSm<float, kAnchors, false> - (std::is_same_v<scalar_t, double> ? 1 : 0);

template <Anchors kAnchors, bool kShort>
using SquaresTable = GradTable<kAnchors != Anchors::kNone, false, SquaresCommon, kShort>;

// As update_grads_kernel without noise, and each block leaves the sum of the squares that it has
// read. A kernel of its own, so that the other one stays as it was tuned.
template <typename scalar_t, Anchors kAnchors, bool kShort>
__global__ void __launch_bounds__(kThreads, (kSquaresBlocksPerSm<scalar_t, kAnchors>))
    update_grads_squares_kernel(const SquaresTable<kAnchors, kShort> __grid_constant__ table) {
  using acc_t = acc_type<scalar_t>;
  const SquaresCommon& call = table.common;
  const int chunk = table.chunks - 1 - static_cast<int>(blockIdx.x);
  const int found = find_entry(table, chunk);
  const auto& entry = table.entries[found];
  TensorUpdate<scalar_t> tensor{};
  tensor.in = static_cast<const scalar_t*>(entry.grad);
  tensor.out = static_cast<scalar_t*>(entry.grad);
  tensor.numel = entry.numel;
  tensor.scale =
      call.scale.values != nullptr ? load_coefficient<acc_t>(call.scale, entry.slot) : acc_t(1);
  if constexpr (kAnchors != Anchors::kNone) {
    tensor.pull = load_coefficient<acc_t>(call.pull, entry.slot);
    tensor.pair = anchor_pair<kAnchors>(entry);
  }
  tensor.store = tensor.scale != acc_t(1) || tensor.pull != acc_t(0);
  SquareSum<acc_t> squares;
  const bool finite =
      update_chunk<kAnchors, false>(tensor, chunk - table.first_chunk[found], squares);
  if (!finite && call.finite != nullptr) set_flag(call.finite, false);
  acc_t sum[1] = {squares.sum};
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) call.partials[chunk] = sum[0];
}

struct SqNormEntry {
  int64_t first;  // of the tensor's partial sums
  int64_t count;
};

template <int kLength>
struct SqNormTable {
  const double* partials;
  void* sq_norm;
  bool wide;
  int64_t first_slot;
  SqNormEntry entries[kLength];
};

// One block per tensor adds its chunks' sums, in float64 and in the same order every time.
template <int kLength>
__global__ void __launch_bounds__(kSumThreads)
    update_grads_sq_norm_kernel(const SqNormTable<kLength> __grid_constant__ table) {
  const SqNormEntry& entry = table.entries[blockIdx.x];
  const int64_t slot = table.first_slot + blockIdx.x;
  double sum[1] = {0};
  // Unrolled so that several are on their way: one block has 32,768 of a large tensor.
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < entry.count; i += kSumThreads) {
    sum[0] += table.partials[entry.first + i];
  }
  block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) store_result(table.sq_norm, table.wide, sum[0], slot);
}

// The row at which each tensor's partial sums begin, by its slot, while the groups' tables launch.
struct PartialRows {
  std::vector<int64_t> first;
  int64_t next = 0;
};

template <typename scalar_t, Anchors kAnchors, bool kNoise>
void launch_group(const UpdateGradsParams& params, cudaStream_t stream) {
  // Without noise any order will do, with it a tensor in channels_last has a kernel of its own.
  const auto chunks_of = [](const GradTensor& tensor) {
    return kNoise && tensor.channels > 1 ? 0 : chunk_count(tensor.numel, kUpdateChunk);
  };
  visit_table_length<scalar_t, kAnchors>(params.tensors, kDType<scalar_t>, [&](auto is_short) {
    constexpr bool kShort = decltype(is_short)::value;
    UpdateTable<kAnchors, kNoise, kShort> table;
    table.common = params.common;
    for_each_table_of<kAnchors != Anchors::kNone, kNoise>(
        params.tensors, kDType<scalar_t>, kAnchors, chunks_of, table, [&] {
          launch("update_grads_kernel", update_grads_kernel<scalar_t, kAnchors, kNoise, kShort>,
                 table.chunks, kThreads, stream, table);
        });
  });
}

template <typename scalar_t, Anchors kAnchors>
void launch_transposed_group(const UpdateGradsParams& params, cudaStream_t stream) {
  TransposedTable<kAnchors> table;
  table.common = params.common;
  const auto chunks_of = [](const GradTensor& tensor) {
    return tensor.channels > 1 ? transposed_tiles(tensor) : 0;
  };
  for_each_table_of<kAnchors != Anchors::kNone, true>(
      params.tensors, kDType<scalar_t>, kAnchors, chunks_of, table, [&] {
        launch("update_grads_transposed_kernel", update_grads_transposed_kernel<scalar_t, kAnchors>,
               table.chunks, kThreads, stream, table);
      });
}

template <typename scalar_t, Anchors kAnchors>
void launch_squares_group(const UpdateGradsParams& params, const SquaresCommon& common,
                          PartialRows& rows, cudaStream_t stream) {
  visit_table_length<scalar_t, kAnchors>(params.tensors, kDType<scalar_t>, [&](auto is_short) {
    constexpr bool kShort = decltype(is_short)::value;
    SquaresTable<kAnchors, kShort> table;
    table.common = common;
    for_each_table<kAnchors != Anchors::kNone, false>(
        params.tensors, kDType<scalar_t>, kAnchors, kUpdateChunk, table, [&] {
          table.common.partials = params.partials + rows.next;
          for (int i = 0; i < table.count; ++i) {
            rows.first[table.entries[i].slot] = rows.next + table.first_chunk[i];
          }
          rows.next += table.chunks;
          launch("update_grads_squares_kernel",
                 update_grads_squares_kernel<scalar_t, kAnchors, kShort>, table.chunks, kThreads,
                 stream, table);
        });
  });
}

template <int kLength>
void launch_sq_norm(const UpdateGradsParams& params, const PartialRows& rows, cudaStream_t stream) {
  SqNormTable<kLength> table;
  table.partials = params.partials;
  table.sq_norm = params.sq_norm;
  table.wide = params.wide_sq_norm;
  const int64_t tensors = static_cast<int64_t>(params.tensors.size());
  for (table.first_slot = 0; table.first_slot < tensors; table.first_slot += kLength) {
    const int64_t count = std::min<int64_t>(tensors - table.first_slot, kLength);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = table.first_slot + i;
      table.entries[i] = {rows.first[slot], chunk_count(params.tensors[slot].numel, kUpdateChunk)};
    }
    launch("update_grads_sq_norm_kernel", update_grads_sq_norm_kernel<kLength>, count, kSumThreads,
           stream, table);
  }
}

// Updates all tensors, and forms their sums. With noise it forms the sums alone: no method wants
// both, and kernels for both would be twelve more.
void launch_squares(const UpdateGradsParams& params, bool has_noise, cudaStream_t stream) {
  PartialRows rows;
  rows.first.resize(params.tensors.size());
  SquaresCommon common{};
  if (!has_noise) common = {params.common.scale, params.common.pull, params.common.finite, nullptr};
  visit_groups(params.tensors, common.pull.values != nullptr, [&](auto* type, auto anchors) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    launch_squares_group<scalar_t, anchors.value>(params, common, rows, stream);
  });
  if (params.tensors.size() <= kShortList) {
    launch_sq_norm<kShortList>(params, rows, stream);
  } else {
    launch_sq_norm<kLongSums>(params, rows, stream);
  }
}

// A launch of its own, where nobody counts the blocks: every block of the update reads the step.
__global__ void advance_stream_kernel(int64_t* step, const bool* finite) {
  advance_step(step, finite);
}

}  // namespace

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream) {
  const bool has_noise = params.common.noise_std.values != nullptr;
  const bool has_params = params.common.pull.values != nullptr;
  if (params.sq_norm != nullptr) launch_squares(params, has_noise, stream);
  if (params.sq_norm != nullptr && !has_noise) return;
  visit_groups(params.tensors, has_params, [&](auto* type, auto anchors) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (has_noise) {
      launch_group<scalar_t, anchors.value, true>(params, stream);
      launch_transposed_group<scalar_t, anchors.value>(params, stream);
    } else {
      launch_group<scalar_t, anchors.value, false>(params, stream);
    }
  });
  if (params.advanced != nullptr) {
    launch("advance_stream_kernel", advance_stream_kernel, 1, 1, stream, params.advanced,
           static_cast<const bool*>(params.common.finite));
  }
}

}  // namespace mmfuse::cuda
