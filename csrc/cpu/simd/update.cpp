#include "update.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "glue/chunks.h"

#define MMFUSE_KERNEL "update_kernel.h"
#include "foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Without noise, and sums to be the same ones always, memory sets the time, and a core that reads
// one stretch for longer gets more of it.
constexpr int64_t kLongChunk = 4 * kChunk;

Nanoseconds cost_of(const UpdateSlice& slice, bool squares) {
  double element = slice.dtype == DType::kFloat32 ? 0.08 : 0.1;
  if (slice.pull != 0) element += 0.12;
  if (slice.noise_std != 0) element += 0.6;
  if (squares) element += 0.03;
  return slice.size * ns(element);
}

}  // namespace

bool launch_update(std::vector<UpdateSlice>& tensors, bool check_finite, double* sq_norm) {
  if (!check_finite && sq_norm == nullptr) {
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_identity), tensors.end());
  }
  // Forwards: a core reads ahead across chunks only that way.
  const std::vector<Chunk>& chunks = make_chunks(tensors, [&](const UpdateSlice& slice) {
    if (!is_transposed(slice)) return slice.noise_std != 0 || sq_norm ? kChunk : kLongChunk;
    const int64_t row = slice.channels * slice.spatial;  // whole rows, at least one
    return std::max(row, kChunk / row * row);
  });
  Nanoseconds cost = ns(0);
  for (const UpdateSlice& slice : tensors) cost = cost + cost_of(slice, sq_norm != nullptr);
  const auto kernel = MMFUSE_SIMD_SELECT(update_slice);
  std::atomic<bool> finite{true};
  std::vector<double> squares(sq_norm != nullptr ? chunks.size() : 0);
  parallel_each(chunks, cost, [&](const Chunk& chunk, size_t i) {
    UpdateSlice slice = tensors[chunk.tensor];
    slice.begin = chunk.begin;
    slice.size = chunk.size;
    double* sum = sq_norm != nullptr ? &squares[i] : nullptr;
    if (!kernel(slice, sum)) finite.store(false, std::memory_order_relaxed);
  });
  if (sq_norm != nullptr) {
    std::fill_n(sq_norm, tensors.size(), 0.0);
    for (size_t i = 0; i < chunks.size(); ++i) sq_norm[chunks[i].tensor] += squares[i];
  }
  return finite.load();
}

}  // namespace mmfuse::cpu
