// Marks functions that both the host's compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define MMFUSE_HD __host__ __device__ __forceinline__
#else
#define MMFUSE_HD inline
#endif
