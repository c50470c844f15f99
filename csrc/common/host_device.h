// Marks functions that both the host's compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define MMFUSE_HD __host__ __device__ __forceinline__
#else
#define MMFUSE_HD inline
#endif

namespace mmfuse {

// A product that is rounded by itself: fused with a difference that follows, a * b - a * b is a
// rounding error, not 0.
MMFUSE_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  const volatile double product = a * b;  // a compiler that contracts does not look behind it
  return product;
#endif
}

}  // namespace mmfuse
