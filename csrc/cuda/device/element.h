// Element types on the device: how they are widened, rounded, and moved 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/philox.h"
#include "params.h"

namespace mmfuse::cuda {

// The type that arithmetic on scalar_t is done in.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
constexpr DType kDType = std::is_same_v<scalar_t, double>          ? DType::kFloat64
                         : std::is_same_v<scalar_t, __half>        ? DType::kFloat16
                         : std::is_same_v<scalar_t, __nv_bfloat16> ? DType::kBFloat16
                                                                   : DType::kFloat32;

constexpr int kVectorBytes = 16;

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t widen(scalar_t x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return static_cast<acc_t>(__half2float(x));
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return static_cast<acc_t>(__bfloat162float(x));
  } else {
    return static_cast<acc_t>(x);
  }
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t round_to(acc_type<scalar_t> x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename scalar_t, int kCount>
struct alignas(sizeof(scalar_t) * kCount < kVectorBytes ? sizeof(scalar_t) * kCount : kVectorBytes)
    Pack {
  scalar_t v[kCount];
};

template <bool kVector, int kCount, typename scalar_t>
__device__ __forceinline__ Pack<scalar_t, kCount> load_pack(const scalar_t* source) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Pack<scalar_t, kCount>*>(source);
  } else {
    Pack<scalar_t, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.v[j] = source[j];
    return pack;
  }
}

template <bool kVector, int kCount, typename scalar_t>
__device__ __forceinline__ void store_pack(scalar_t* target, const Pack<scalar_t, kCount>& pack) {
  if constexpr (kVector) {
    *reinterpret_cast<Pack<scalar_t, kCount>*>(target) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) target[j] = pack.v[j];
  }
}

__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename acc_t>
__device__ __forceinline__ acc_t load_coefficient(const Coefficients& coefficients, int64_t slot) {
  return coefficients.wide
             ? static_cast<acc_t>(static_cast<const double*>(coefficients.values)[slot])
             : static_cast<acc_t>(static_cast<const float*>(coefficients.values)[slot]);
}

__device__ __forceinline__ void store_result(void* results, bool wide, double value,
                                             int64_t slot = 0) {
  if (wide) {
    static_cast<double*>(results)[slot] = value;
  } else {
    static_cast<float*>(results)[slot] = static_cast<float>(value);
  }
}

// Calls f with a null pointer of the element type; for kernels and for host code alike.
#pragma nv_exec_check_disable
template <typename F>
MMFUSE_HD void visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace mmfuse::cuda
