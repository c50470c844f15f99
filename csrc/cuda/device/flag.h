// Flags that many threads of many blocks may set, all to the same value.
#pragma once

#include <cuda_runtime.h>

namespace mmfuse::cuda {

// A plain store would be a race, even of equal values; a volatile one is relaxed, in PTX's terms.
__device__ __forceinline__ void set_flag(bool* flag, bool value) {
#ifdef MMFUSE_CUDA_ON_CPU
  store_relaxed(flag, value);
#else
  *static_cast<volatile bool*>(flag) = value;
#endif
}

}  // namespace mmfuse::cuda
