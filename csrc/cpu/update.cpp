#include "update.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "chunks.h"

#define MMFUSE_KERNEL "update_kernel.h"
#include "foreach_simd.h"

namespace mmfuse::cpu {

bool launch_update(std::vector<UpdateSlice> tensors, bool check_finite) {
  if (!check_finite) {
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_identity), tensors.end());
  }
  std::vector<Chunk> chunks = make_chunks(tensors);
  // Backwards: what grad_stats read last is still in the cache.
  std::reverse(chunks.begin(), chunks.end());
  const auto kernel = MMFUSE_SIMD_SELECT(update_slice);
  std::atomic<bool> finite{true};
  parallel_each(chunks, [&](const Chunk& chunk, size_t) {
    UpdateSlice slice = tensors[chunk.tensor];
    slice.begin = chunk.begin;
    slice.size = chunk.size;
    if (!kernel(slice)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace mmfuse::cpu
