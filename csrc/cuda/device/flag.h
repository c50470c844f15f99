// A flag that many threads of many blocks may set, all to the same value, and a count of the blocks
// that are done.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mmfuse::cuda {

// A plain store would be a race, even of equal values; a volatile one is relaxed, in PTX's terms.
__device__ __forceinline__ void set_flag(bool* flag, bool value) {
#ifdef MMFUSE_CUDA_ON_CPU
  store_relaxed(flag, value);
#else
  *static_cast<volatile bool*>(flag) = value;
#endif
}

// True in one thread of the last of `blocks` blocks that come here; `done` starts at 0. That thread
// sees what all threads of all blocks have written before, and what they have read was not its own.
__device__ __forceinline__ bool is_last_block(int32_t* done, int32_t blocks) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
#ifdef MMFUSE_CUDA_ON_CPU
  const int32_t before = add_in_order(done, int32_t{1});
#else
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(done)
               : "memory");
#endif
  return before == blocks - 1;
}

}  // namespace mmfuse::cuda
