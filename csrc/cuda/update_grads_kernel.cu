#include <algorithm>

#include "launch.h"
#include "partial_sums.h"
#include "reduce.h"
#include "update_grads.h"
#include "update_tensor.h"

namespace mmfuse::cuda {
namespace {

// As many as the registers allow.
template <Anchors kAnchors, bool kNoise>
constexpr int kBlocksPerSm = kAnchors == Anchors::kNone ? (kNoise ? 4 : 5) : (kNoise ? 3 : 4);

constexpr int kSumThreads = 256;

// With sums, where the table's chunks leave theirs.
template <bool kSquares>
struct TableCommon : UpdateCommon {};

template <>
struct TableCommon<true> : UpdateCommon {
  double* partials;
};

template <bool kHasAnchors, bool kNoise, bool kSquares>
using UpdateTable = TensorTable<Entry<kHasAnchors, kNoise>, TableCommon<kSquares>>;

// One block per chunk, from the last to the first: what grad_stats read last is still in the cache.
template <typename scalar_t, Anchors kAnchors, bool kNoise, bool kSquares>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<kAnchors, kNoise>)) update_grads_kernel(
    const UpdateTable<kAnchors != Anchors::kNone, kNoise, kSquares> __grid_constant__ table) {
  using acc_t = acc_type<scalar_t>;
  const auto& call = table.common;
  const int chunk = table.chunks - 1 - static_cast<int>(blockIdx.x);
  const auto& entry = table.entries[find_entry(table, chunk)];
  TensorUpdate<scalar_t> tensor{};
  tensor.in = static_cast<const scalar_t*>(entry.grad);
  tensor.out = static_cast<scalar_t*>(entry.grad);
  tensor.numel = entry.numel;
  if (kSquares && call.scale.values == nullptr) {
    tensor.scale = 1;
  } else {
    tensor.scale = load_coefficient<acc_t>(call.scale, entry.slot);
  }
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
  if (!kSquares && !tensor.store && call.finite == nullptr) return;
  SquareSum<acc_t, kSquares> squares;
  const bool finite = update_chunk<kAnchors, kNoise>(tensor, chunk - entry.first_chunk, squares);
  if (!finite && call.finite != nullptr) *call.finite = false;
  if constexpr (kSquares) {
    acc_t sum[1] = {squares.sum};
    block_sum<kThreads>(sum);
    if (threadIdx.x == 0) call.partials[chunk] = sum[0];
  }
}

struct SqNormEntry {
  int64_t first;  // of the tensor's partial sums
  int64_t count;
};

struct SqNormTable {
  static constexpr int kCapacity = 2000;
  const double* partials;
  void* sq_norm;
  bool wide;
  int64_t first_slot;
  SqNormEntry entries[kCapacity];
};

// One block per tensor adds its chunks' sums, in float64 and in the same order every time.
__global__ void __launch_bounds__(kSumThreads)
    update_grads_sq_norm_kernel(const SqNormTable __grid_constant__ table) {
  const SqNormEntry& entry = table.entries[blockIdx.x];
  const int64_t slot = table.first_slot + blockIdx.x;
  double sum[1] = {0};
  // Unrolled so that several are on their way: one block has 32,768 of a large tensor.
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < entry.count; i += kSumThreads) {
    sum[0] += table.partials[entry.first + i];
  }
  block_sum<kSumThreads>(sum);
  if (threadIdx.x != 0) return;
  void* result = table.wide ? static_cast<void*>(static_cast<double*>(table.sq_norm) + slot)
                            : static_cast<void*>(static_cast<float*>(table.sq_norm) + slot);
  store_result(result, table.wide, sum[0]);
}

// Where each tensor's partial sums begin, by its slot, while the groups' tables are launched.
struct PartialRows {
  std::vector<int64_t> first;
  int64_t next = 0;
};

template <typename scalar_t, Anchors kAnchors, bool kNoise, bool kSquares>
void launch_group(const UpdateGradsParams& params, PartialRows& rows, cudaStream_t stream) {
  constexpr bool kHasAnchors = kAnchors != Anchors::kNone;
  UpdateTable<kHasAnchors, kNoise, kSquares> table;
  static_cast<UpdateCommon&>(table.common) = params.common;
  for_each_table<kHasAnchors, kNoise>(
      params.tensors, kDType<scalar_t>, kAnchors, kUpdateChunk, table, [&] {
        if constexpr (kSquares) {
          table.common.partials = params.partials + rows.next;
          for (int i = 0; i < table.count; ++i) {
            rows.first[table.entries[i].slot] = rows.next + table.entries[i].first_chunk;
          }
          rows.next += table.chunks;
        }
        launch("update_grads_kernel", update_grads_kernel<scalar_t, kAnchors, kNoise, kSquares>,
               table.chunks, kThreads, stream, table);
      });
}

template <bool kNoise, bool kSquares>
void launch_groups(const UpdateGradsParams& params, PartialRows& rows, cudaStream_t stream) {
  const bool has_anchors = params.common.pull.values != nullptr;
  visit_groups(params.tensors, has_anchors, [&](auto* type, auto anchors) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    launch_group<scalar_t, anchors.value, kNoise, kSquares>(params, rows, stream);
  });
}

void launch_sq_norm(const UpdateGradsParams& params, const PartialRows& rows, cudaStream_t stream) {
  SqNormTable table;
  table.partials = params.partials;
  table.sq_norm = params.sq_norm;
  table.wide = params.wide_sq_norm;
  const int64_t tensors = static_cast<int64_t>(params.tensors.size());
  for (table.first_slot = 0; table.first_slot < tensors;
       table.first_slot += SqNormTable::kCapacity) {
    const int64_t count = std::min<int64_t>(tensors - table.first_slot, SqNormTable::kCapacity);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = table.first_slot + i;
      table.entries[i] = {rows.first[slot], chunk_count(params.tensors[slot].numel, kUpdateChunk)};
    }
    launch("update_grads_sq_norm_kernel", update_grads_sq_norm_kernel, count, kSumThreads, stream,
           table);
  }
}

}  // namespace

void launch_update_grads(const UpdateGradsParams& params, cudaStream_t stream) {
  const bool has_noise = params.common.noise_std.values != nullptr;
  PartialRows rows;
  if (params.sq_norm != nullptr) {
    rows.first.resize(params.tensors.size());
    if (has_noise) {
      // A pass of its own: no method wants both, and kernels for both would be twelve more.
      UpdateGradsParams sums = params;
      sums.common = {};
      launch_groups<false, true>(sums, rows, stream);
    } else {
      launch_groups<false, true>(params, rows, stream);
    }
    launch_sq_norm(params, rows, stream);
    if (!has_noise) return;
  }
  if (has_noise) {
    launch_groups<true, false>(params, rows, stream);
  } else {
    launch_groups<false, false>(params, rows, stream);
  }
}

}  // namespace mmfuse::cuda
