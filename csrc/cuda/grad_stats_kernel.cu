#include <algorithm>

#include "common/moments.h"
#include "cuda/device/launch.h"
#include "cuda/device/modulate.h"
#include "cuda/device/pack_batch.h"
#include "cuda/device/reduce.h"
#include "grad_stats.h"

namespace mmfuse::cuda {
namespace {

template <typename scalar_t>
constexpr int kBlocksPerSm = std::is_same_v<scalar_t, double> ? 2 : 4;

constexpr int kFinaliseThreads = 256;

// Tensors of a long table of merges; a short one has kShortList.
constexpr int kLongMerges = 2000;

template <Anchors kAnchors, bool kShort>
using StatsTable = GradTable<kAnchors != Anchors::kNone, false, double*, kShort>;

// Moments of one batch of which `valid` packs exist, by two passes over registers.
template <Anchors kAnchors, bool kVector, int kPacks, typename scalar_t>
__device__ __forceinline__ Moments<acc_type<scalar_t>> batch_moments(const scalar_t* grad,
                                                                     const AnchorPair& pair,
                                                                     acc_type<scalar_t> shift,
                                                                     int64_t index, int valid) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  Moments<acc_t> batch;
  batch.n = valid * kPack;
  acc_t values[kPacks][kPack];
  load_batch<kVector>(grad + index, kThreads * kPack, valid, values);
  if constexpr (kAnchors != Anchors::kNone) {
    acc_t displacement[kPacks][kPack];
    load_displacements<kAnchors, scalar_t, kVector>(pair, index, kThreads * kPack, valid,
                                                    displacement);
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        batch.dot += displacement[u][j] * values[u][j];
        batch.disp_sq += displacement[u][j] * displacement[u][j];
      }
    }
  }
  acc_t sum = 0;
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      values[u][j] -= shift;
      if (u < valid) sum += values[u][j];
    }
  }
  batch.mean = sum / static_cast<acc_t>(valid * kPack);
#pragma unroll
  for (int u = 0; u < kPacks; ++u) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const acc_t centred = values[u][j] - batch.mean;
      if (u < valid) batch.m2 += centred * centred;
    }
  }
  return batch;
}

// Moments of g - shift over this thread's part of `packs` packs from element `first` on.
template <Anchors kAnchors, bool kVector, typename scalar_t>
__device__ __forceinline__ Moments<acc_type<scalar_t>> pack_moments(const scalar_t* grad,
                                                                    const AnchorPair& pair,
                                                                    acc_type<scalar_t> shift,
                                                                    int64_t first, int packs) {
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  constexpr int kRegisters = kAnchors == Anchors::kNone ? 16 : 8;
  constexpr int kPacks = kBatchPacks<scalar_t, kAnchors, kRegisters>;
  Moments<acc_type<scalar_t>> total;
  int p = threadIdx.x;
  for (; p + (kPacks - 1) * kThreads < packs; p += kPacks * kThreads) {
    total = merge_moments(total, batch_moments<kAnchors, kVector, kPacks>(
                                     grad, pair, shift, first + p * kPack, kPacks));
  }
  if (kPacks > 1 && p < packs) {
    const int valid = (packs - p + kThreads - 1) / kThreads;
    total = merge_moments(total, batch_moments<kAnchors, kVector, kPacks>(
                                     grad, pair, shift, first + p * kPack, valid));
  }
  return total;
}

// Merges the threads' moments, whose counts add up to n; the result is in every thread.
template <bool kHasParams, typename acc_t>
__device__ __forceinline__ Moments<acc_t> block_moments(const Moments<acc_t>& mine, int64_t n) {
  const acc_t count = static_cast<acc_t>(mine.n);
  acc_t sum[1] = {count * mine.mean};
  block_sum<kThreads>(sum);
  Moments<acc_t> total;
  total.n = n;
  total.mean = sum[0] / static_cast<acc_t>(n);
  const acc_t delta = mine.mean - total.mean;
  if constexpr (kHasParams) {
    acc_t sums[3] = {mine.m2 + count * delta * delta, mine.dot, mine.disp_sq};
    block_sum<kThreads>(sums);
    total.m2 = sums[0];
    total.dot = sums[1];
    total.disp_sq = sums[2];
  } else {
    acc_t sums[1] = {mine.m2 + count * delta * delta};
    block_sum<kThreads>(sums);
    total.m2 = sums[0];
  }
  return total;
}

// The one in the middle of three elements: one alone may be unlike all others, as where the rest of
// an embedding's gradient is zero.
template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t usual_element(const scalar_t* grad, int64_t numel) {
  const acc_t a = widen<acc_t>(grad[0]);
  const acc_t b = widen<acc_t>(grad[numel / 2]);
  const acc_t c = widen<acc_t>(grad[numel - 1]);
  const acc_t low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

// One row of the workspace per chunk. All means are relative to one of the tensor's elements: a
// mean much larger than the spread then costs no digits, in any precision.
template <typename scalar_t, Anchors kAnchors, bool kShort>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    grad_stats_kernel(const StatsTable<kAnchors, kShort> __grid_constant__ table) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kPack = kPackSize<scalar_t, kAnchors>;
  const int chunk = blockIdx.x;
  const int found = find_entry(table, chunk);
  const auto& entry = table.entries[found];
  const int part = chunk - table.first_chunk[found];
  const scalar_t* grad = static_cast<const scalar_t*>(entry.grad);
  const AnchorPair pair = anchor_pair<kAnchors>(entry);
  const int64_t first = static_cast<int64_t>(part) * kStatsChunk;
  const int64_t left = entry.numel - first;
  const int elements = left < kStatsChunk ? static_cast<int>(left) : kStatsChunk;
  const acc_t shift = usual_element<acc_t>(grad, entry.numel);
  bool vector = is_aligned(grad);
  if constexpr (kAnchors != Anchors::kNone) {
    vector = vector && is_aligned<kAnchors, scalar_t>(pair, 0);
  }
  Moments<acc_t> mine =
      vector ? pack_moments<kAnchors, true>(grad, pair, shift, first, elements / kPack)
             : pack_moments<kAnchors, false>(grad, pair, shift, first, elements / kPack);
  if (static_cast<int>(threadIdx.x) < elements % kPack) {
    const int64_t index = first + elements - elements % kPack + threadIdx.x;
    const acc_t value = widen<acc_t>(grad[index]);
    Moments<acc_t> last;
    last.n = 1;
    last.mean = value - shift;
    if constexpr (kAnchors != Anchors::kNone) {
      const acc_t displacement = load_displacement<kAnchors, scalar_t>(pair, index);
      last.dot = displacement * value;
      last.disp_sq = displacement * displacement;
    }
    mine = merge_moments(mine, last);
  }
  const Moments<acc_t> total = block_moments<kAnchors != Anchors::kNone>(mine, elements);
  if (threadIdx.x == 0) {
    double* row = table.common + static_cast<int64_t>(entry.slot + part) * kStatsRow;
    row[0] = shift;
    row[1] = total.mean;
    row[2] = total.m2;
    row[3] = total.dot;
    row[4] = total.disp_sq;
  }
}

struct FinaliseEntry {
  int64_t numel;
  int64_t first_row;
};

struct FinaliseCommon {
  const double* workspace;
  int64_t* numel;
  void* moments;
  bool wide;
  bool has_params;
  int64_t first_slot;
  int64_t tensors;
};

// A launch that decides nothing.
struct NoDecision {};

template <int kLength, typename decision_t>
struct FinaliseTable {
  FinaliseCommon common;
  decision_t decision;
  FinaliseEntry entries[kLength];
};

__device__ __forceinline__ void store_moment(const FinaliseCommon& common, int64_t index,
                                             double value) {
  if (common.wide) {
    static_cast<double*>(common.moments)[index] = value;
  } else {
    static_cast<float*>(common.moments)[index] = static_cast<float>(value);
  }
}

// One block per tensor merges its rows, in float64 and in the same order every time, and stores its
// moments or decides from them; then the first one also decides about the modalities.
template <int kLength, typename decision_t>
__global__ void __launch_bounds__(kFinaliseThreads)
    grad_stats_finalise_kernel(const FinaliseTable<kLength, decision_t> __grid_constant__ table) {
  constexpr bool kDecides = !std::is_same_v<decision_t, NoDecision>;
  const FinaliseCommon& common = table.common;
  const FinaliseEntry& entry = table.entries[blockIdx.x];
  const int64_t slot = common.first_slot + blockIdx.x;
  const int64_t rows = chunk_count(entry.numel, kStatsChunk);
  const double* workspace = common.workspace + entry.first_row * kStatsRow;
  const auto row_count = [&](int64_t row) {
    const int64_t left = entry.numel - row * kStatsChunk;
    return static_cast<double>(left < kStatsChunk ? left : kStatsChunk);
  };
  double sum[1] = {0};
  // Unrolled so that several rows are on their way: one block has 16,384 of a large tensor.
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += kFinaliseThreads) {
    sum[0] += row_count(row) * workspace[row * kStatsRow + 1];
  }
  block_sum<kFinaliseThreads>(sum);
  const double mean = rows > 0 ? sum[0] / static_cast<double>(entry.numel) : 0.0;
  if constexpr (kDecides) {
    if (slot == 0) {
      for (int64_t m = threadIdx.x; m < table.decision.modalities; m += kFinaliseThreads) {
        decide_modality(table.decision, m);
      }
    }
  }
  double sums[3] = {0, 0, 0};
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < rows; row += kFinaliseThreads) {
    const double* values = workspace + row * kStatsRow;
    const double delta = values[1] - mean;
    sums[0] += values[2] + row_count(row) * delta * delta;
    sums[1] += values[3];
    sums[2] += values[4];
  }
  block_sum<kFinaliseThreads>(sums);
  if (threadIdx.x != 0) return;
  if constexpr (kDecides) {
    if (slot == 0) start_update(table.decision);
    decide_tensor(table.decision, slot);
    // Rounded as a moment is.
    const double m2 = common.wide ? sums[0] : static_cast<float>(sums[0]);
    decide_noise(table.decision, slot, entry.numel, m2);
    return;
  }
  common.numel[slot] = entry.numel;
  store_moment(common, slot, rows > 0 ? workspace[0] + mean : 0.0);
  store_moment(common, common.tensors + slot, sums[0]);
  if (common.has_params) {
    store_moment(common, 2 * common.tensors + slot, sums[1]);
    store_moment(common, 3 * common.tensors + slot, sums[2]);
  }
}

template <typename scalar_t, Anchors kAnchors>
void launch_chunks(const std::vector<GradTensor>& tensors, double* workspace, cudaStream_t stream) {
  visit_table_length<scalar_t, kAnchors>(tensors, kDType<scalar_t>, [&](auto is_short) {
    constexpr bool kShort = decltype(is_short)::value;
    StatsTable<kAnchors, kShort> table;
    table.common = workspace;
    for_each_table<kAnchors != Anchors::kNone, false>(
        tensors, kDType<scalar_t>, kAnchors, kStatsChunk, table, [&] {
          launch("grad_stats_kernel", grad_stats_kernel<scalar_t, kAnchors, kShort>, table.chunks,
                 kThreads, stream, table);
        });
  });
}

template <int kLength, typename decision_t>
void launch_finalise(const GradStatsParams& params, const decision_t& decision,
                     cudaStream_t stream) {
  FinaliseTable<kLength, decision_t> table;
  table.decision = decision;
  const int64_t tensors = static_cast<int64_t>(params.tensors.size());
  table.common = {params.workspace, params.numel, params.moments, params.wide, params.has_params, 0,
                  tensors};
  int64_t row = 0;
  int64_t& first = table.common.first_slot;
  for (first = 0; first < tensors; first += kLength) {
    const int64_t count = std::min<int64_t>(tensors - first, kLength);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t numel = params.tensors[first + i].numel;
      table.entries[i] = {numel, row};
      row += chunk_count(numel, kStatsChunk);
    }
    launch("grad_stats_finalise_kernel", grad_stats_finalise_kernel<kLength, decision_t>, count,
           kFinaliseThreads, stream, table);
  }
}

}  // namespace

void launch_grad_stats(const GradStatsParams& params, cudaStream_t stream) {
  // The chunk kernel needs no coefficients: its slot is the tensor's first row in the workspace.
  std::vector<GradTensor> tensors = params.tensors;
  int64_t row = 0;
  for (GradTensor& tensor : tensors) {
    tensor.slot = static_cast<int32_t>(row);
    row += chunk_count(tensor.numel, kStatsChunk);
  }
  visit_groups(tensors, params.has_params, [&](auto* type, auto anchors) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    launch_chunks<scalar_t, anchors.value>(tensors, params.workspace, stream);
  });
  const auto finalise = [&](const auto& decision) {
    if (params.tensors.size() <= kShortList) {
      launch_finalise<kShortList>(params, decision, stream);
    } else {
      launch_finalise<kLongMerges>(params, decision, stream);
    }
  };
  params.decision == nullptr ? finalise(NoDecision{}) : finalise(*params.decision);
}

}  // namespace mmfuse::cuda
